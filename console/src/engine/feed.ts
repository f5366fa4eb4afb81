/** The stream of GET /engine/events. It is read only while the page is seen. */
import { batch, effect, signal } from "@preact/signals";
import { ApiError, apiKey, call, events } from "../common/api";
import { state as server } from "../common/server";

export interface Latency {
  count: number;
  p50: number;
  p95: number;
}

export interface Step {
  id: number;
  ended: number;
  execute_us: number[];
  num_decodes: number;
  num_prompt_tokens: number;
  failed: boolean;
}

export interface EngineRequest {
  number: number;
  request_id: string | null;
  client: string;
  running: boolean;
  num_prompt_tokens: number;
  num_cached_tokens: number;
  num_computed_tokens: number;
  num_output_tokens: number;
  max_total_tokens: number;
  num_blocks: number;
  num_preemptions: number;
  adapter_id: number;
  age: number;
}

export interface Totals {
  steps: number;
  computed_tokens: number;
  generated_tokens: number;
  prefix_queries: number;
  prefix_hits: number;
  preemptions: number;
  evictions: number;
  ended_requests: number;
  worker_losses: number;
}

/** [id of the first block, index of the parent, blocks, hits, blocks that are held] */
export type PrefixNode = [number, number, number, number, number];

interface Event {
  state: "serving" | "no_engine" | "no_scheduler";
  why?: string;
  time: number;
  load: {
    num_requests_running: number;
    num_requests_waiting: number;
    num_clients_waiting: number;
    num_used_blocks: number;
    num_blocks: number;
    max_num_seqs: number;
    max_num_waiting: number;
    num_steps_in_flight: number;
  };
  totals: Totals;
  ttft: Latency | null;
  itl: Latency | null;
  steps: Step[];
  num_steps_left_out: number;
  requests: EngineRequest[];
  blocks: { stride: number; ref_counts: string; cached: string; owners: string };
  prefixes: { nodes: PrefixNode[]; num_left_out: number; roots: string } | null;
}

export interface Blocks {
  stride: number;
  refCounts: Uint8Array;
  cached: Uint8Array;
  /** For each place the number of a request that holds the block, -1 for none. */
  owners: Int32Array;
  roots: Uint8Array;
}

/** One point of the charts. */
export interface Sample {
  at: number;
  generated: number | null;
  prompt: number | null;
  ttft: Latency | null;
  itl: Latency | null;
  running: number;
  waiting: number;
}

export const SECONDS_SHOWN = 120;
const SECONDS_OF_STEPS = 12;
/** Rates are those of this many seconds, so that they do not jump with single steps. */
const RATE_SECONDS = 2;

export const latest = signal<Event | null>(null);
export const connection = signal<"connecting" | "open" | "lost">("connecting");
export const why = signal("");
export const blocks = signal<Blocks | null>(null);
export const prefixes = signal<Event["prefixes"]>(null);
export const samples = signal<Sample[]>([]);
/** The last steps, and when this page heard of them last, by the scheduler's clock and by this one's. */
export const steps: Step[] = [];
export const clock = { scheduler: 0, here: 0 };

const history: { time: number; totals: Totals }[] = [];

function decode(text: string): Uint8Array {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function take(event: Event): void {
  connection.value = "open";
  if (event.state === "no_scheduler") {
    why.value = event.why ?? "";
    server.value = { kind: "away", why: "the scheduler is away" };
    latest.value = latest.value && { ...latest.value, state: "no_scheduler", requests: [], steps: [] };
    history.length = 0;
    return;
  }
  server.value = event.state === "serving" ? { kind: "ready" } : { kind: "away", why: "no engine is attached" };
  if (event.time < clock.scheduler) restarted();
  clock.scheduler = event.time;
  clock.here = performance.now();
  steps.push(...event.steps);
  while (steps[0] && steps[0].ended < event.time - SECONDS_OF_STEPS) steps.shift();
  samples.value = [...samples.value, sample(event)].filter((each) => each.at > Date.now() / 1000 - SECONDS_SHOWN);
  if (event.prefixes) prefixes.value = event.prefixes;
  if (event.state === "serving") {
    const owners = Int32Array.from(decode(event.blocks.owners), (index) => (index ? event.requests[index - 1]!.number : -1));
    blocks.value = {
      stride: event.blocks.stride,
      refCounts: decode(event.blocks.ref_counts),
      cached: decode(event.blocks.cached),
      owners,
      roots: prefixes.value ? decode(prefixes.value.roots) : new Uint8Array(owners.length),
    };
  } else {
    prefixes.value = null;
    blocks.value = null;
  }
  latest.value = event;
}

/** Another scheduler has another clock and counts from the beginning. */
function restarted(): void {
  history.length = 0;
  steps.length = 0;
}

function sample(event: Event): Sample {
  history.push({ time: event.time, totals: event.totals });
  while (history.length > 2 && history[1]!.time <= event.time - RATE_SECONDS) history.shift();
  const first = history[0]!;
  const seconds = event.time - first.time;
  const rate = (name: "generated_tokens" | "computed_tokens") =>
    seconds > 0 ? Math.max(0, (event.totals[name] - first.totals[name]) / seconds) : null;
  const generated = rate("generated_tokens");
  const computed = rate("computed_tokens");
  return {
    at: Date.now() / 1000,
    generated,
    prompt: computed === null ? null : Math.max(0, computed - (generated ?? 0)),
    ttft: event.ttft,
    itl: event.itl,
    running: event.load.num_requests_running,
    waiting: event.load.num_requests_waiting,
  };
}

async function watch(abort: AbortSignal): Promise<void> {
  while (!abort.aborted) {
    try {
      const response = await call("engine/events", { signal: abort });
      for await (const data of events(response)) {
        if (abort.aborted) return;
        batch(() => take(JSON.parse(data)));
      }
    } catch (error) {
      if (abort.aborted) return;
      why.value = (error as Error).message;
      if (error instanceof ApiError && error.status === 401) return; // a new key starts anew
    }
    connection.value = "lost";
    history.length = 0;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

/** Watches while the page is seen, anew with every key. */
export function startWatching(): void {
  const seen = signal(!document.hidden);
  document.addEventListener("visibilitychange", () => (seen.value = !document.hidden));
  effect(() => {
    void apiKey.value;
    if (!seen.value) return;
    const abort = new AbortController();
    void watch(abort.signal);
    return () => abort.abort();
  });
}
