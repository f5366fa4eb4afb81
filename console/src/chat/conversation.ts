/** A conversation is a tree of messages: editing or regenerating adds a sibling, and one child of each is shown. */

export interface ToolCall {
  id: string;
  name: string;
  arguments: string;
}

export interface Stats {
  promptTokens: number;
  cachedTokens: number;
  outputTokens: number;
  /** Seconds to the first token, and to the end. */
  firstToken: number;
  total: number;
  /** Seconds in which the engine was away. */
  away: number;
}

export interface Message {
  id: string;
  parent: string;
  role: "user" | "assistant" | "tool";
  content: string;
  created: number;
  thoughts?: string;
  /** Seconds that the model thought. */
  thoughtFor?: number;
  toolCalls?: ToolCall[];
  toolCallId?: string;
  model?: string;
  finish?: string;
  error?: string;
  stats?: Stats;
}

export interface Settings {
  system: string;
  model: string;
  temperature: string;
  top_p: string;
  top_k: string;
  min_p: string;
  max_tokens: string;
  seed: string;
  repetition_penalty: string;
  presence_penalty: string;
  frequency_penalty: string;
  stop: string;
  thinking: "" | "on" | "off";
  effort: "" | "low" | "medium" | "high";
  tools: string;
}

export interface Conversation {
  id: string;
  title: string;
  created: number;
  updated: number;
  settings: Settings;
  messages: Record<string, Message>;
  /** By parent, the child that is shown. */
  shown: Record<string, string>;
}

export const ROOT = "";

export const NO_SETTINGS: Settings = {
  system: "",
  model: "",
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_tokens: "",
  seed: "",
  repetition_penalty: "",
  presence_penalty: "",
  frequency_penalty: "",
  stop: "",
  thinking: "",
  effort: "",
  tools: "",
};

const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "seed",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
] as const;

export function newConversation(settings: Settings): Conversation {
  const now = Date.now();
  return { id: newId(), title: "New chat", created: now, updated: now, settings, messages: {}, shown: {} };
}

/** Pages without HTTPS have no crypto.randomUUID. */
export function newId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The messages that are shown, from first to last. */
export function path(conversation: Conversation): Message[] {
  const messages: Message[] = [];
  let at: string | undefined = ROOT;
  while ((at = conversation.shown[at]) !== undefined) {
    const message: Message | undefined = conversation.messages[at];
    if (!message) break;
    messages.push(message);
  }
  return messages;
}

export function siblings(conversation: Conversation, message: Message): Message[] {
  return Object.values(conversation.messages)
    .filter((each) => each.parent === message.parent)
    .sort((a, b) => a.created - b.created);
}

export function add(conversation: Conversation, message: Omit<Message, "id" | "created">): Message {
  const latest = Math.max(0, ...Object.values(conversation.messages).map((each) => each.created));
  const added: Message = { ...message, id: newId(), created: Math.max(Date.now(), latest + 1) };
  conversation.messages[added.id] = added;
  conversation.shown[added.parent] = added.id;
  if (added.role === "user" && Object.keys(conversation.messages).length === 1) {
    conversation.title = added.content.trim().replace(/\s+/g, " ").slice(0, 60) || "New chat";
  }
  return added;
}

/** The body of POST /v1/chat/completions.
 *
 * @throws Error if what was typed as tools is no JSON.
 */
export function requestBody(settings: Settings, before: Message[], unfinished: Message | null): Record<string, unknown> {
  const messages: Record<string, unknown>[] = [];
  if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
  for (const message of unfinished ? [...before, unfinished] : before) messages.push(asSent(message));
  const body: Record<string, unknown> = { messages, stream: true, stream_options: { include_usage: true } };
  if (settings.model) body.model = settings.model;
  for (const name of NUMBERS) {
    if (settings[name].trim()) body[name] = Number(settings[name]);
  }
  const stop = settings.stop.split("\n").filter((line) => line);
  if (stop.length) body.stop = stop;
  if (settings.thinking) body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.effort) body.reasoning_effort = settings.effort;
  const tools = readTools(settings.tools);
  if (tools.length) body.tools = tools;
  if (unfinished) body.continue_final_message = true;
  return body;
}

/** @throws Error if it is no JSON array. */
export function readTools(text: string): unknown[] {
  if (!text.trim()) return [];
  const tools: unknown = JSON.parse(text);
  if (!Array.isArray(tools)) throw new Error("Tools must be a JSON array, as in OpenAI's API.");
  return tools;
}

function asSent(message: Message): Record<string, unknown> {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.toolCallId, content: message.content };
  const sent: Record<string, unknown> = { role: message.role, content: message.content };
  if (message.toolCalls?.length) {
    sent.tool_calls = message.toolCalls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
    if (!message.content) sent.content = null;
  }
  return sent;
}
