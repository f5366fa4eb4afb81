/** The KV pool: a cell for each block, coloured by who holds it or by the prefix that it caches. */
import { useSignal } from "@preact/signals";
import { colour, colours } from "../common/theme";
import { Canvas } from "./canvas";
import { hue } from "./colours";
import { type Blocks, blocks, latest, prefixes } from "./feed";

type Mode = "owner" | "prefix";
const HEIGHT = 300;

/** Pixels that a cell has at most. */
const LARGEST = 26;

interface Grid {
  columns: number;
  size: number;
}

function gridOf(count: number, width: number, height: number): Grid {
  let columns = Math.max(1, Math.floor(width / LARGEST), Math.floor(Math.sqrt((count * width) / height)));
  while (Math.ceil(count / columns) * (width / columns) > height) columns++;
  return { columns, size: width / columns };
}

export function BlockMap() {
  const mode = useSignal<Mode>("owner");
  const under = useSignal<string>("");
  const now = blocks.value;
  const load = latest.value?.load;
  void colours.value;
  const num = now?.refCounts.length ?? 0;
  const cachedFree = now ? now.cached.reduce((sum, is, at) => sum + (is && !now.refCounts[at] ? 1 : 0), 0) : 0;
  const label = load
    ? `${load.num_used_blocks} of ${load.num_blocks} blocks are held by requests; about ${Math.round((cachedFree / Math.max(1, num)) * load.num_blocks)} further ones are cached.`
    : "No engine is attached.";

  function draw(context: CanvasRenderingContext2D, width: number, height: number) {
    context.clearRect(0, 0, width, height);
    if (!now) return;
    const { columns, size } = gridOf(num, width, height);
    const gap = size > 5 ? 1.5 : size > 3 ? 1 : 0.5;
    const paint = painter(now, mode.value);
    for (let at = 0; at < num; at++) {
      context.fillStyle = paint(at);
      context.beginPath();
      context.roundRect((at % columns) * size, Math.floor(at / columns) * size, size - gap, size - gap, size > 8 ? 2 : 0);
      context.fill();
    }
  }

  function point(x: number, y: number, event: PointerEvent) {
    if (!now) return;
    const target = event.target as HTMLElement;
    const { columns, size } = gridOf(num, target.clientWidth, HEIGHT);
    const column = Math.floor(x / size);
    const at = Math.floor(y / size) * columns + column;
    under.value = column < columns && at >= 0 && at < num ? describe(now, at) : "";
  }

  return (
    <section class="card span-2" aria-labelledby="blocks-title">
      <div class="card-head">
        <h2 id="blocks-title">KV blocks</h2>
        <span class="hint">
          {load && `${load.num_used_blocks.toLocaleString("en")} of ${load.num_blocks.toLocaleString("en")} held`}
          {now && now.stride > 1 && ` · one cell for ${now.stride} blocks`}
        </span>
        <div class="choice" role="group" aria-label="Coloured by">
          {(["owner", "prefix"] as const).map((each) => (
            <button key={each} aria-pressed={mode.value === each} onClick={() => (mode.value = each)}>
              By {each === "owner" ? "owner" : "cached prefix"}
            </button>
          ))}
        </div>
      </div>
      {now ? (
        <Canvas height={HEIGHT} label={label} draw={draw} onPoint={point} onLeave={() => (under.value = "")} />
      ) : (
        <p class="empty tall">No engine is attached, so there is no pool.</p>
      )}
      <p class="legend">
        {under.value ? (
          <span>{under.value}</span>
        ) : mode.value === "owner" ? (
          <>
            <Key gradient>a request's own</Key>
            <Key name="map-shared">shared by several</Key>
            <Key name="map-cached">cached, held by nobody</Key>
            <Key name="map-free">free</Key>
          </>
        ) : (
          <>
            <Key gradient>a hue for each first prefix</Key>
            <Key name="map-cached">cached, in none of the prefixes shown</Key>
            <Key name="map-free">not cached</Key>
          </>
        )}
      </p>
    </section>
  );
}

function Key(props: { name?: string; gradient?: boolean; children: string }) {
  return (
    <span class="key">
      <i class={props.gradient ? "many" : undefined} style={props.name ? { background: `var(--${props.name})` } : undefined} />
      {props.children}
    </span>
  );
}

function painter(now: Blocks, mode: Mode): (at: number) => string {
  const free = colour("map-free");
  const cached = colour("map-cached");
  const shared = colour("map-shared");
  const hues = new Map<number, string>();
  const hueOf = (number: number) => {
    let value = hues.get(number);
    if (!value) hues.set(number, (value = hue(number)));
    return value;
  };
  if (mode === "prefix") {
    const nodes = prefixes.value?.nodes ?? [];
    return (at) => {
      const root = now.roots[at]!;
      if (now.cached[at] && root) return hueOf(nodes[root - 1]?.[0] ?? root);
      return now.cached[at] ? cached : free;
    };
  }
  return (at) => {
    const references = now.refCounts[at]!;
    if (references > 1) return shared;
    if (references === 1) return now.owners[at]! >= 0 ? hueOf(now.owners[at]!) : colour("soft");
    return now.cached[at] ? cached : free;
  };
}

function describe(now: Blocks, at: number): string {
  const references = now.refCounts[at]!;
  const held =
    references > 1 ? `held by ${references} requests` : references ? `held by request ${now.owners[at]! >= 0 ? `#${now.owners[at]}` : "that is not shown"}` : "held by nobody";
  return `Block ${at * now.stride}: ${held}, ${now.cached[at] ? "can be found by its content" : "not cached"}`;
}
