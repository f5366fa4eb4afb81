/** Calls to the server this page came from: the API key, and errors in words. */
import { signal } from "@preact/signals";

const KEY = "pagewire.key";

export const apiKey = signal(sessionStorage.getItem(KEY) ?? "");
/** Why the page asks for a key; null while it does not. */
export const keyWanted = signal<string | null>(null);

export function setApiKey(key: string): void {
  sessionStorage.setItem(KEY, key);
  apiKey.value = key;
  keyWanted.value = null;
}

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

export async function call(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (apiKey.value) headers.set("authorization", `Bearer ${apiKey.value}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running, and is the network up?", 0);
  }
  if (response.ok) return response;
  throw await asError(response);
}

export async function getJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await (await call(path, { signal })).json()) as T;
}

async function asError(response: Response): Promise<ApiError> {
  let said = "";
  try {
    const body = await response.json();
    said = typeof body.error === "string" ? body.error : (body.error?.message ?? "");
  } catch {
    said = response.statusText;
  }
  if (response.status === 401) keyWanted.value = apiKey.value ? "That key is not accepted." : "";
  const after = response.headers.get("retry-after");
  return new ApiError(inWords(response.status, said, after), response.status);
}

function inWords(status: number, said: string, after: string | null): string {
  const when = after ? ` Try again in about ${after} s.` : "";
  if (status === 401) return "This server asks for an API key.";
  if (status === 429) return `The server has no room right now: ${said}.${when}`;
  if (status === 503) return `The server cannot answer right now: ${said}.${when}`;
  if (status === 413) return `That is too large: ${said}.`;
  if (status >= 500) return `The server failed: ${said || `status ${status}`}.`;
  return said ? `The server did not take this: ${said}.` : `The server answered with status ${status}.`;
}

/** The data of server-sent events, one after the other. */
export async function* events(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      let end: number;
      while ((end = rest.indexOf("\n\n")) >= 0) {
        const frame = rest.slice(0, end);
        rest = rest.slice(end + 2);
        const data = frame
          .split("\n")
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
