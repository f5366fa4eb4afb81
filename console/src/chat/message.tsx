/** One message: what it says, what the model thought and called, what it cost, and what can be done with it. */
import { memo } from "preact/compat";
import { useMemo, useRef, useState } from "preact/hooks";
import { Icon, type IconName } from "../common/icons";
import { state as server } from "../common/server";
import { type Message, type Stats, type ToolCall, siblings } from "./conversation";
import { toHtml } from "./markdown";
import { answering, current, edit, giveResult, goOn, regenerate, show } from "./state";

const ENDS: Record<string, string> = {
  length: "The answer reached its limit of tokens.",
  stopped: "You stopped this answer.",
  abort: "The server ended this answer before it was complete.",
};

export function MessageView({ message, isLast, told }: { message: Message; isLast: boolean; told: Set<string | undefined> }) {
  const [editing, setEditing] = useState(false);
  const live = answering.value?.message === message;
  if (message.role === "tool") return <ToolResult message={message} />;
  if (editing) return <Editor message={message} close={() => setEditing(false)} />;
  return (
    <article class={`message ${message.role}`} data-id={message.id} aria-label={message.role === "user" ? "You" : "Assistant"}>
      {message.thoughts && <Thoughts message={message} live={live && !message.content} />}
      {message.role === "user" ? <div class="bubble">{message.content}</div> : <Text text={message.content} live={live} />}
      {message.toolCalls?.map((call) => (
        <Call key={call.id} call={call} message={message} waits={isLast || !told.has(call.id)} told={told.has(call.id)} live={live} />
      ))}
      {live && <Waiting message={message} />}
      {message.finish && ENDS[message.finish] && <p class="note">{ENDS[message.finish]}</p>}
      {message.error && (
        <p class="note error" role="alert">
          {message.error}
          {message.content && " What had come is kept."}
        </p>
      )}
      {!live && <Actions message={message} isLast={isLast} startEditing={() => setEditing(true)} />}
    </article>
  );
}

const Text = memo(({ text, live }: { text: string; live: boolean }) => {
  const html = useMemo(() => toHtml(text), [text]);
  return <div class={live ? "prose live" : "prose"} onClick={copyCode} dangerouslySetInnerHTML={{ __html: html }} />;
});

async function copyCode(event: MouseEvent): Promise<void> {
  const button = (event.target as HTMLElement).closest<HTMLButtonElement>(".code-copy");
  if (!button) return;
  await copy(button.closest(".code")!.querySelector("code")!.textContent ?? "");
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

/** Pages without HTTPS have no clipboard but by selecting. */
async function copy(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function Thoughts({ message, live }: { message: Message; live: boolean }) {
  const seconds = message.thoughtFor ? ` for ${message.thoughtFor.toFixed(1)} s` : "";
  return (
    <details class="thoughts" open={live}>
      <summary>
        <Icon name="thought" />
        {live ? "Thinking" : "Thought"}
        {seconds}
      </summary>
      <div class="thoughts-text">{message.thoughts}</div>
    </details>
  );
}

function Call(props: { call: ToolCall; message: Message; waits: boolean; told: boolean; live: boolean }) {
  const field = useRef<HTMLTextAreaElement>(null);
  const { call, message } = props;
  return (
    <div class="call">
      <div class="call-head">
        <Icon name="tool" />
        <span>
          calls <code>{call.name}</code>
        </span>
      </div>
      <pre tabindex={0} aria-label={`Arguments of ${call.name}`}>{pretty(call.arguments)}</pre>
      {!props.told && !props.live && (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            giveResult(message, call.id, field.current!.value);
          }}
        >
          <textarea ref={field} rows={2} aria-label={`Result of ${call.name}`} placeholder="What the tool answers" required />
          <button class="secondary">Give the result</button>
        </form>
      )}
    </div>
  );
}

function ToolResult({ message }: { message: Message }) {
  return (
    <article class="message tool" aria-label="Tool's result">
      <div class="call result">
        <div class="call-head">
          <Icon name="check" />
          <span>Result</span>
        </div>
        <pre tabindex={0} aria-label="Result">{pretty(message.content)}</pre>
      </div>
    </article>
  );
}

function pretty(text: string): string {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** While an answer comes: a cursor before its first word, and what is the matter if the engine is away. */
function Waiting({ message }: { message: Message }) {
  if (server.value.kind === "away") {
    return (
      <p class="note warn" role="status">
        <i class="spinner" aria-hidden="true" />
        The engine is away ({server.value.why}). Your answer is kept and goes on when it is back.
      </p>
    );
  }
  if (message.content || message.thoughts || message.toolCalls) return null;
  return (
    <p class="dots" role="status" aria-label="Waiting for the first word">
      <i />
      <i />
      <i />
    </p>
  );
}

function Actions({ message, isLast, startEditing }: { message: Message; isLast: boolean; startEditing: () => void }) {
  const [copied, setCopied] = useState(false);
  const busy = answering.value !== null;
  const action = (name: IconName, label: string, onClick: () => void, disabled = false) => (
    <button class="ghost small" title={label} aria-label={label} onClick={onClick} disabled={disabled}>
      <Icon name={name} />
    </button>
  );
  return (
    <div class="actions">
      <Branches message={message} />
      {action(copied ? "check" : "copy", "Copy", () => {
        void copy(message.content);
        setCopied(true);
        setTimeout(() => setCopied(false), 1500);
      })}
      {message.role === "user" && action("edit", "Edit", startEditing, busy)}
      {message.role === "assistant" && action("redo", "Regenerate", () => regenerate(message), busy)}
      {message.role === "assistant" && isLast && message.content && message.finish !== "stop" && !message.toolCalls && (
        <button class="ghost small text" onClick={() => goOn(message)} disabled={busy}>
          <Icon name="play" />
          Continue
        </button>
      )}
      {message.stats && <Numbers stats={message.stats} model={message.model} />}
    </div>
  );
}

function Branches({ message }: { message: Message }) {
  const all = siblings(current.value!, message);
  if (all.length < 2) return null;
  const at = all.indexOf(message);
  const step = (by: number, name: IconName, label: string) => (
    <button class="ghost small" aria-label={label} title={label} disabled={!all[at + by] || !!answering.value} onClick={() => show(all[at + by]!)}>
      <Icon name={name} />
    </button>
  );
  return (
    <span class="branches">
      {step(-1, "left", "Earlier version")}
      <span>
        {at + 1} / {all.length}
      </span>
      {step(1, "right", "Later version")}
    </span>
  );
}

function Numbers({ stats, model }: { stats: Stats; model?: string }) {
  const decoding = stats.total - stats.firstToken - stats.away;
  const speed = stats.outputTokens > 1 && decoding > 0 ? (stats.outputTokens - 1) / decoding : 0;
  const cached = stats.cachedTokens ? `, ${stats.cachedTokens} of them cached` : "";
  const title = `${model}: ${stats.promptTokens} prompt tokens${cached}; first token after ${stats.firstToken.toFixed(2)} s`;
  return (
    <span class="numbers" title={title}>
      {stats.outputTokens} tokens{speed ? ` · ${speed.toFixed(1)} tokens/s` : ""}
      <span class="wide"> · first after {milliseconds(stats.firstToken)}</span>
      {stats.away > 0 && <span> · the engine was away for {stats.away.toFixed(0) === "0" ? "1" : stats.away.toFixed(0)} s</span>}
    </span>
  );
}

function milliseconds(seconds: number): string {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

function Editor({ message, close }: { message: Message; close: () => void }) {
  const field = useRef<HTMLTextAreaElement>(null);
  function submit() {
    edit(message, field.current!.value);
    close();
  }
  return (
    <form
      class="message user editor"
      onSubmit={(event) => {
        event.preventDefault();
        submit();
      }}
    >
      <textarea
        ref={(element) => {
          field.current = element;
          element?.focus();
        }}
        aria-label="Edit your message"
        rows={Math.min(12, message.content.split("\n").length + 1)}
        defaultValue={message.content}
        onKeyDown={(event) => {
          if (event.key === "Escape") close();
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            submit();
          }
        }}
      />
      <div class="row end">
        <button type="button" class="secondary" onClick={close}>
          Cancel
        </button>
        <button class="primary">Send</button>
      </div>
    </form>
  );
}
