/** What each rank did in the last seconds: a bar for each step. */
import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { colour } from "../common/theme";
import { Canvas } from "./canvas";
import { duration } from "./charts";
import { type Step, clock, latest, steps } from "./feed";

const SECONDS = 6;
/** The picture is this far behind, so that it moves evenly although news come twice a second. */
const BEHIND = 0.8;
const LANE = 44;
const AXIS = 20;

export function Timeline() {
  const under = useSignal("");
  const tick = useSignal(0);
  const ranks = Math.max(1, ...steps.map((step) => step.execute_us.length));
  const height = ranks * LANE + AXIS;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  void latest.value;
  void tick.value;

  useEffect(() => {
    if (still) return;
    const timer = setInterval(() => tick.value++, 60);
    return () => clearInterval(timer);
  }, []);

  const end = () => clock.scheduler + (still ? 0 : (performance.now() - clock.here) / 1000 - BEHIND);

  function draw(context: CanvasRenderingContext2D, width: number) {
    context.clearRect(0, 0, width, height);
    const to = end();
    const from = to - SECONDS;
    const x = (moment: number) => ((moment - from) / SECONDS) * width;
    const paints = { decode: colour("series-1"), prompt: colour("series-2"), failed: colour("bad") };
    context.font = "11px sans-serif";
    context.textBaseline = "middle";
    for (let rank = 0; rank < ranks; rank++) {
      const top = rank * LANE;
      context.fillStyle = colour("sunken");
      context.fillRect(0, top + 4, width, LANE - 8);
      for (const step of steps) {
        const begin = step.ended - (step.execute_us[rank] ?? 0) / 1e6;
        if (step.ended < from || begin > to) continue;
        context.fillStyle = step.failed ? paints.failed : step.num_prompt_tokens ? paints.prompt : paints.decode;
        const left = x(begin);
        context.fillRect(left, top + 4, Math.max(1, x(step.ended) - left - 0.6), LANE - 8);
      }
    }
    context.fillStyle = colour("soft");
    for (let second = 0; second < SECONDS; second++) {
      context.fillText(second ? `-${second} s` : "now", second ? x(to - second) - 10 : width - 26, height - AXIS / 2);
    }
  }

  function point(x: number, y: number, event: PointerEvent) {
    const width = (event.target as HTMLElement).clientWidth;
    const rank = Math.min(ranks - 1, Math.floor(y / LANE));
    const moment = end() - SECONDS + (x / width) * SECONDS;
    const found = steps.find((step) => moment <= step.ended && moment >= step.ended - (step.execute_us[rank] ?? 0) / 1e6);
    under.value = found ? describe(found, rank) : "";
  }

  const last = steps.at(-1);
  return (
    <section class="card span-4" aria-labelledby="timeline-title">
      <div class="card-head">
        <h2 id="timeline-title">Steps by rank</h2>
        <span class="hint">
          {ranks === 1 ? "one rank" : `${ranks} ranks`}
          {last && `, the last step took ${duration(Math.max(...last.execute_us) / 1e6)}`}
          {latest.value?.num_steps_left_out ? ` · of many steps the last are shown` : ""}
        </span>
      </div>
      <Canvas height={height} label={`Steps of the last ${SECONDS} seconds`} draw={draw} onPoint={point} onLeave={() => (under.value = "")} />
      <p class="legend">
        {under.value ? (
          <span>{under.value}</span>
        ) : (
          <>
            <span class="key"><i style={{ background: "var(--series-1)" }} />decodes only</span>
            <span class="key"><i style={{ background: "var(--series-2)" }} />with prompts</span>
            <span class="key"><i style={{ background: "var(--bad)" }} />failed</span>
          </>
        )}
      </p>
    </section>
  );
}

function describe(step: Step, rank: number): string {
  const work = [];
  if (step.num_decodes) work.push(`${step.num_decodes} decodes`);
  if (step.num_prompt_tokens) work.push(`${step.num_prompt_tokens} prompt tokens`);
  return `Step ${step.id} on rank ${rank}: ${duration((step.execute_us[rank] ?? 0) / 1e6)}, ${work.join(" and ") || "no tokens"}${step.failed ? ", failed" : ""}`;
}
