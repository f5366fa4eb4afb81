/** What is known of the server: its models, its engine, and whether it would serve a request now. */
import { effect, signal } from "@preact/signals";
import { ApiError, apiKey, getJson, keyWanted } from "./api";

export interface ModelEntry {
  id: string;
  parent: string | null;
  root: string | null;
  max_model_len: number | null;
}

export interface ServerInfo {
  version: string;
  served_model_names: string[];
  ready: boolean;
  engine: null | {
    model: string;
    dtype: string;
    device: string;
    vocab_size: number;
    max_model_len: number;
    block_size: number;
    num_blocks: number;
    max_num_seqs: number;
    max_num_batched_tokens: number;
    task: string;
  };
}

/** One scheduler of those that the frontend knows, as /health tells. */
export interface Replica {
  name: string;
  healthy: boolean;
  reason: string | null;
  open_requests: number;
}

export type State = { kind: "checking" } | { kind: "ready" } | { kind: "away"; why: string };

const AWAY: State = { kind: "away", why: "no engine is attached" };

export const models = signal<ModelEntry[]>([]);
export const replicas = signal<Replica[]>([]);
export const info = signal<ServerInfo | null>(null);
export const state = signal<State>({ kind: "checking" });

export async function loadServer(): Promise<void> {
  try {
    const [list, facts] = await Promise.all([
      getJson<{ data: ModelEntry[] }>("v1/models"),
      getJson<ServerInfo>("server_info"),
    ]);
    learnModels(list.data);
    info.value = facts;
    state.value = facts.ready ? { kind: "ready" } : AWAY;
    replicas.value = (await getJson<{ servers: Replica[] }>("health")).servers;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
  }
}

/** Adapters come and go; nothing is drawn again if they are the same. */
function learnModels(list: ModelEntry[]): void {
  const names = (each: ModelEntry[]) => JSON.stringify(each.map(({ id, parent, root }) => [id, parent, root]));
  if (names(list) !== names(models.value)) models.value = list;
}

/** Asks whether the server is ready, and what it serves. /ready itself would fill the browser's console with its 503s. */
export async function checkReady(): Promise<void> {
  if (keyWanted.value !== null) return;
  try {
    const facts = await getJson<ServerInfo>("server_info");
    info.value = facts;
    state.value = facts.ready ? { kind: "ready" } : AWAY;
    learnModels((await getJson<{ data: ModelEntry[] }>("v1/models")).data);
    replicas.value = (await getJson<{ servers: Replica[] }>("health")).servers;
  } catch (error) {
    if ((error as ApiError).status === 0) state.value = { kind: "away", why: "the server cannot be reached" };
  }
}

/** Loads what is known, and again with every new key; asks now and then whether the server is ready. */
export function watchServer(seconds: number): void {
  effect(() => {
    void apiKey.value;
    void loadServer();
  });
  setInterval(() => {
    if (!document.hidden) void checkReady();
  }, seconds * 1000);
}
