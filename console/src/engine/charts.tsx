/** Tokens a second, latencies and queues over the last two minutes. */
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { colour, colours } from "../common/theme";
import { SECONDS_SHOWN, type Sample, samples } from "./feed";

/** What is shown at first, while there is little to show. */
const FEWEST_SECONDS = 30;

interface Line {
  label: string;
  colour: string;
  of: (sample: Sample) => number | null;
  /** Whether the line goes on over what was not measured. */
  gaps?: boolean;
}

interface ChartProps {
  id: string;
  title: string;
  unit: string;
  lines: Line[];
  format: (value: number) => string;
}

const HEIGHT = 150;

function Chart({ id, title, unit, lines, format }: ChartProps) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const painted = colours.value;

  useEffect(() => {
    const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px sans-serif" };
    const made = new uPlot(
      {
        width: place.current!.clientWidth,
        height: HEIGHT,
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false } },
        padding: [8, 8, 0, 0],
        scales: {
          x: { time: false, range: () => [-span(), 0] },
          y: { range: (_, __, most) => [0, Math.max(most ?? 0, 0.000001) * 1.15] },
        },
        axes: [
          { ...axis, size: 24, splits: ticks, values: (_, shown) => shown.map((tick) => `${tick} s`) },
          { ...axis, size: 46, values: (_, shown) => shown.map(format), space: 30 },
        ],
        series: [
          {},
          ...lines.map((line, index) => ({
            label: line.label,
            stroke: colour(line.colour),
            width: 2,
            points: { show: false },
            fill: index === 0 ? `${colour(line.colour)}22` : undefined,
            spanGaps: line.gaps,
          })),
        ],
      },
      data(lines),
      place.current!,
    );
    plot.current = made;
    const observer = new ResizeObserver(() => made.setSize({ width: place.current!.clientWidth, height: HEIGHT }));
    observer.observe(place.current!);
    return () => {
      observer.disconnect();
      made.destroy();
    };
  }, [painted]);

  const now = samples.value;
  useEffect(() => plot.current?.setData(data(lines)), [now]);
  const last = (line: Line) => now.map(line.of).findLast((value) => value !== null);

  return (
    <section class="card" aria-labelledby={`${id}-title`}>
      <div class="card-head">
        <h2 id={`${id}-title`}>{title}</h2>
        <span class="hint">{unit}</span>
        <p class="legend compact">
          {lines.map((line) => {
            const value = last(line);
            return (
              <span key={line.label} class="key">
                <i style={{ background: `var(--${line.colour})` }} />
                {line.label} <b>{value === undefined ? "–" : format(value!)}</b>
              </span>
            );
          })}
        </p>
      </div>
      <div ref={place} class="plot" role="img" aria-label={`${title} over the last two minutes`} />
    </section>
  );
}

/** Where the time is written: round numbers of seconds. */
function ticks(): number[] {
  const step = span() > 90 ? 30 : span() > 45 ? 15 : 10;
  return Array.from({ length: Math.floor(span() / step) }, (_, index) => -step * (index + 1)).reverse();
}

/** Seconds that are shown. */
function span(): number {
  const first = samples.peek()[0]?.at ?? 0;
  return Math.min(SECONDS_SHOWN, Math.max(FEWEST_SECONDS, Date.now() / 1000 - first));
}

function data(lines: Line[]): uPlot.AlignedData {
  const all = samples.peek();
  const now = Date.now() / 1000;
  return [all.map((each) => each.at - now), ...lines.map((line) => all.map(line.of))] as uPlot.AlignedData;
}

export function short(value: number): string {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(0)}k`;
  if (value >= 1e3) return `${(value / 1e3).toFixed(1)}k`;
  return value >= 10 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

export function duration(seconds: number): string {
  if (seconds >= 10) return `${seconds.toFixed(0)} s`;
  if (seconds >= 1) return `${seconds.toFixed(1)} s`;
  const ms = seconds * 1000;
  return `${ms >= 10 || ms === 0 ? ms.toFixed(0) : ms.toFixed(1)} ms`;
}

export function Charts() {
  return (
    <>
      <Chart
        id="tokens"
        title="Tokens"
        unit="a second"
        format={short}
        lines={[
          { label: "generated", colour: "series-1", of: (each) => each.generated },
          { label: "prompt", colour: "series-2", of: (each) => each.prompt },
        ]}
      />
      <Chart
        id="queue"
        title="Requests"
        unit="at once"
        format={short}
        lines={[
          { label: "running", colour: "series-1", of: (each) => each.running },
          { label: "waiting", colour: "series-2", of: (each) => each.waiting },
        ]}
      />
      <Chart
        id="ttft"
        title="Time to first token"
        unit=""
        format={duration}
        lines={[
          { label: "median", colour: "series-1", of: (each) => each.ttft?.p50 ?? null, gaps: true },
          { label: "95 %", colour: "series-2", of: (each) => each.ttft?.p95 ?? null, gaps: true },
        ]}
      />
      <Chart
        id="itl"
        title="Between tokens"
        unit=""
        format={duration}
        lines={[
          { label: "median", colour: "series-1", of: (each) => each.itl?.p50 ?? null, gaps: true },
          { label: "95 %", colour: "series-2", of: (each) => each.itl?.p95 ?? null, gaps: true },
        ]}
      />
    </>
  );
}
