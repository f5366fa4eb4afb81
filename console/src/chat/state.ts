/** The page's state, and everything that changes it. */
import { computed, signal } from "@preact/signals";
import { ApiError, call, events } from "../common/api";
import { checkReady, state as server } from "../common/server";
import { type Conversation, type Message, NO_SETTINGS, ROOT, type Settings, add, newConversation, path, requestBody } from "./conversation";
import * as store from "./store";

/** Seconds without a token after which the page asks whether the engine is there. */
const SILENCE = 1.2;

interface Answering {
  conversation: Conversation;
  message: Message;
  abort: AbortController;
}

export const conversations = signal<Conversation[]>([]);
export const currentId = signal("");
/** Counts changes inside of conversations, which are not signals themselves. */
export const version = signal(0);
export const answering = signal<Answering | null>(null);
/** What went wrong with the page itself, such as with its storage. */
export const trouble = signal("");
/** Said to those who do not see the page. */
export const spoken = signal("");

export const current = computed(() => {
  void version.value;
  return conversations.value.find((each) => each.id === currentId.value) ?? null;
});

let drawing = false;

/** Draws again soon, at most once for each picture. */
function changed(): void {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    version.value++;
  });
}

async function save(conversation: Conversation): Promise<void> {
  conversation.updated = Date.now();
  try {
    await store.save(conversation);
  } catch (error) {
    trouble.value = `This browser does not keep the conversation: ${(error as Error).message}`;
  }
}

export async function load(): Promise<void> {
  try {
    conversations.value = await store.loadAll();
  } catch (error) {
    trouble.value = `This browser keeps no conversations: ${(error as Error).message}`;
  }
  const wanted = location.hash.slice(1);
  if (conversations.value.some((each) => each.id === wanted)) currentId.value = wanted;
  else startNew();
}

export function startNew(): void {
  const empty = conversations.value.find((each) => !Object.keys(each.messages).length);
  const latest = conversations.value[0];
  const conversation = empty ?? newConversation({ ...(latest?.settings ?? NO_SETTINGS) });
  if (!empty) conversations.value = [conversation, ...conversations.value];
  select(conversation.id);
}

export function select(id: string): void {
  currentId.value = id;
  history.replaceState(null, "", `#${id}`);
}

export async function remove(conversation: Conversation): Promise<void> {
  if (answering.value?.conversation === conversation) stop();
  conversations.value = conversations.value.filter((each) => each !== conversation);
  await store.remove(conversation.id).catch(() => undefined);
  if (currentId.value === conversation.id) {
    const next = conversations.value[0];
    if (next) select(next.id);
    else startNew();
  }
}

export function rename(conversation: Conversation, title: string): void {
  conversation.title = title.trim() || conversation.title;
  changed();
  void save(conversation);
}

export function set<Name extends keyof Settings>(name: Name, value: Settings[Name]): void {
  const conversation = current.value;
  if (!conversation) return;
  conversation.settings = { ...conversation.settings, [name]: value };
  changed();
  if (Object.keys(conversation.messages).length) void save(conversation);
}

export function stop(): void {
  answering.value?.abort.abort();
}

export function send(text: string): void {
  const conversation = current.value;
  if (!conversation || answering.value || !text.trim()) return;
  const last = path(conversation).at(-1);
  const message = add(conversation, { parent: last?.id ?? ROOT, role: "user", content: text });
  conversations.value = [conversation, ...conversations.value.filter((each) => each !== conversation)];
  void answer(conversation, message.id);
}

/** Asks again from a changed message of the user, beside what was there. */
export function edit(message: Message, text: string): void {
  const conversation = current.value;
  if (!conversation || answering.value || !text.trim()) return;
  const changedMessage = add(conversation, { parent: message.parent, role: "user", content: text });
  void answer(conversation, changedMessage.id);
}

export function regenerate(message: Message): void {
  const conversation = current.value;
  if (conversation && !answering.value) void answer(conversation, message.parent);
}

/** Goes on with an answer that was stopped, cut off or lost. */
export function goOn(message: Message): void {
  const conversation = current.value;
  if (conversation && !answering.value) void answer(conversation, message.parent, message);
}

/** Gives the model the result of a call. When all calls of the message have one, it goes on. */
export function giveResult(message: Message, toolCallId: string, result: string): void {
  const conversation = current.value;
  if (!conversation || answering.value) return;
  const last = path(conversation).at(-1)!;
  const given = add(conversation, { parent: last.id, role: "tool", content: result, toolCallId });
  const told = new Set(path(conversation).map((each) => each.toolCallId));
  if (message.toolCalls!.every((each) => told.has(each.id))) void answer(conversation, given.id);
  else {
    changed();
    void save(conversation);
  }
}

export function show(message: Message): void {
  const conversation = current.value;
  if (!conversation) return;
  conversation.shown[message.parent] = message.id;
  changed();
  void save(conversation);
}

async function answer(conversation: Conversation, parent: string, unfinished: Message | null = null): Promise<void> {
  const before = [];
  for (const each of path(conversation)) {
    if (each === unfinished) break;
    before.push(each);
    if (each.id === parent) break;
  }
  const settings = conversation.settings;
  const message = unfinished ?? add(conversation, { parent, role: "assistant", content: "" });
  delete message.error;
  delete message.finish;
  const abort = new AbortController();
  answering.value = { conversation, message, abort };
  changed();
  await save(conversation);
  try {
    const body = requestBody(settings, before, unfinished);
    await receive(message, body, abort.signal);
    spoken.value = "The answer is complete.";
  } catch (error) {
    if (abort.signal.aborted) message.finish = "stopped";
    else message.error = (error as Error).message;
    spoken.value = message.error ? "" : "Stopped."; // an error is an alert already
  } finally {
    answering.value = null;
    changed();
    await save(conversation);
  }
}

async function receive(message: Message, body: Record<string, unknown>, signal: AbortSignal): Promise<void> {
  const began = performance.now();
  let firstAt = 0;
  let heardAt = began;
  let away = 0;
  const since = (moment: number) => (performance.now() - moment) / 1000;
  const watching = setInterval(() => {
    if (since(heardAt) > SILENCE) void checkReady();
    if (server.value.kind === "away") away += 0.5;
  }, 500);
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(`The answer broke off: ${event.error.message}`, response.status);
      heardAt = performance.now();
      if (server.value.kind !== "ready") void checkReady();
      message.model = event.model;
      const choice = event.choices?.[0];
      if (choice) {
        firstAt ||= performance.now();
        take(message, choice, since(began));
      }
      if (event.usage) {
        message.stats = {
          promptTokens: event.usage.prompt_tokens,
          cachedTokens: event.usage.prompt_tokens_details?.cached_tokens ?? 0,
          outputTokens: event.usage.completion_tokens,
          firstToken: firstAt ? (firstAt - began) / 1000 : 0,
          total: since(began),
          away,
        };
      }
      changed();
    }
    if (!message.finish) throw new ApiError("The connection broke before the answer was complete.", 0);
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The connection to the server broke.", 0);
    throw error;
  } finally {
    clearInterval(watching);
  }
}

function take(message: Message, choice: any, seconds: number): void {
  const delta = choice.delta ?? {};
  if (delta.reasoning_content) {
    message.thoughts = (message.thoughts ?? "") + delta.reasoning_content;
    message.thoughtFor = seconds;
  }
  if (delta.content) message.content += delta.content;
  for (const told of delta.tool_calls ?? []) {
    const calls = (message.toolCalls ??= []);
    const at = (calls[told.index] ??= { id: "", name: "", arguments: "" });
    at.id = told.id ?? at.id;
    at.name += told.function?.name ?? "";
    at.arguments += told.function?.arguments ?? "";
  }
  if (choice.finish_reason) message.finish = choice.finish_reason;
}
