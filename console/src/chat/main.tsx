import { render } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon } from "../common/icons";
import { info, models, watchServer } from "../common/server";
import { KeyDialog, TopBar } from "../common/shell";
import "../common/base.css";
import "./chat.css";
import { Composer } from "./composer";
import { path } from "./conversation";
import { MessageView } from "./message";
import { ModelPicker, SettingsPanel } from "./settings";
import { Sidebar } from "./sidebar";
import { conversations, current, currentId, load, select, send, spoken, startNew, stop, trouble, version } from "./state";

const SETTINGS_OPEN = "pagewire.settings";
const WIDE = "(min-width: 1180px)";
const IDEAS = [
  "Explain how a transformer predicts the next word, in five sentences.",
  "Write a Python function that finds the longest common prefix of a list of strings.",
  "Plan a weekend in Lisbon for two people who like books and good coffee.",
  "What is paged attention, and why does it save memory?",
];
const SHORTCUTS: [string, string][] = [
  ["Enter", "send"],
  ["Shift Enter", "new line"],
  ["Esc", "stop the answer"],
  ["↑ in an empty field", "edit your last message"],
  ["Alt N", "new chat"],
  ["Alt ↑ / Alt ↓", "previous or next conversation"],
  ["Alt S", "settings"],
  ["Ctrl /", "these shortcuts"],
];

function Page() {
  const [listOpen, setListOpen] = useState(false);
  const [settingsOpen, setSettingsOpen] = useState(() => localStorage.getItem(SETTINGS_OPEN) === "yes" && matchMedia(WIDE).matches);
  useEffect(() => localStorage.setItem(SETTINGS_OPEN, settingsOpen ? "yes" : "no"), [settingsOpen]);
  const help = useRef<HTMLDialogElement>(null);

  useEffect(() => {
    function onKeyDown(event: KeyboardEvent) {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
        stop();
        setListOpen(false);
      } else if (event.altKey && event.code === "KeyN") startNew();
      else if (event.altKey && event.code === "KeyS") setSettingsOpen((open) => !open);
      else if (event.altKey && event.key === "ArrowUp") step(-1);
      else if (event.altKey && event.key === "ArrowDown") step(1);
      else if ((event.ctrlKey || event.metaKey) && event.key === "/") help.current!.showModal();
      else return;
      if (event.key !== "Escape") event.preventDefault();
    }
    addEventListener("keydown", onKeyDown);
    return () => removeEventListener("keydown", onKeyDown);
  }, []);

  return (
    <div class={`chat-page${listOpen ? " list-open" : ""}${settingsOpen ? " settings-open" : ""}`}>
      <TopBar
        page="chat"
        left={
          <button class="ghost only-narrow" aria-label="Conversations" aria-expanded={listOpen} onClick={() => setListOpen(!listOpen)}>
            <Icon name="menu" />
          </button>
        }
      >
        <div class="only-wide">
          <ModelPicker />
        </div>
        <button class="ghost only-wide" aria-label="Keyboard shortcuts" title="Keyboard shortcuts (Ctrl /)" onClick={() => help.current!.showModal()}>
          <Icon name="keyboard" />
        </button>
        <button class="ghost" aria-label="Settings" title="Settings (Alt S)" aria-expanded={settingsOpen} onClick={() => setSettingsOpen(!settingsOpen)}>
          <Icon name="sliders" />
        </button>
      </TopBar>
      <Sidebar done={() => setListOpen(false)} />
      {(listOpen || settingsOpen) && (
        <div
          class="veil"
          onClick={() => {
            setListOpen(false);
            setSettingsOpen(false);
          }}
        />
      )}
      <main class="talk">
        {trouble.value && <p class="note error page-note" role="alert">{trouble.value}</p>}
        <Messages key={currentId.value} />
        <Composer />
      </main>
      {settingsOpen && <SettingsPanel close={() => setSettingsOpen(false)} />}
      <p class="unseen" role="status">{spoken.value}</p>
      <dialog ref={help} class="dialog" aria-labelledby="keys-title" onClick={(event) => event.target === help.current && help.current!.close()}>
        <h2 id="keys-title">Keyboard</h2>
        <dl class="shortcuts">
          {SHORTCUTS.map(([keys, what]) => (
            <div key={keys}>
              <dt>
                <kbd>{keys}</kbd>
              </dt>
              <dd>{what}</dd>
            </div>
          ))}
        </dl>
        <div class="row end">
          <button class="primary" onClick={() => help.current!.close()}>
            Close
          </button>
        </div>
      </dialog>
      <KeyDialog />
    </div>
  );
}

function step(by: number): void {
  const at = conversations.value.findIndex((each) => each.id === currentId.value);
  const next = conversations.value[at + by];
  if (next) select(next.id);
}

/** The conversation. It stays at its end while it grows, unless the reader has scrolled up. */
function Messages() {
  void version.value;
  const view = useRef<HTMLDivElement>(null);
  const [atEnd, setAtEnd] = useState(true);
  const conversation = current.value;
  const shown = conversation ? path(conversation) : [];
  const told = new Set(shown.map((each) => each.toolCallId));

  useLayoutEffect(() => {
    if (atEnd) toEnd();
  });

  function toEnd() {
    view.current!.scrollTop = view.current!.scrollHeight;
  }

  function onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = view.current!;
    setAtEnd(scrollHeight - scrollTop - clientHeight < 40);
  }

  return (
    <div class="messages-frame">
      <div class="messages" ref={view} onScroll={onScroll} tabindex={0} role="log" aria-live="off" aria-label="Conversation">
        {shown.length ? (
          <div class="column">
            {shown.map((message, index) => (
              <MessageView key={message.id} message={message} isLast={index === shown.length - 1} told={told} />
            ))}
          </div>
        ) : (
          <Welcome />
        )}
      </div>
      {!atEnd && (
        <button class="round to-end" aria-label="To the end" onClick={toEnd}>
          <Icon name="down" />
        </button>
      )}
    </div>
  );
}

function Welcome() {
  const engine = info.value?.engine;
  return (
    <div class="welcome">
      <h1>What shall we talk about?</h1>
      <p class="hint">
        {engine ? `${models.value[0]?.id ?? engine.model} on ${engine.device}, ${engine.max_model_len.toLocaleString("en")} tokens of context` : "Waiting for the server"}
      </p>
      <div class="ideas">
        {IDEAS.map((idea) => (
          <button key={idea} onClick={() => send(idea)}>
            {idea}
          </button>
        ))}
      </div>
    </div>
  );
}

watchServer(10);
void load();
render(<Page />, document.getElementById("app")!);
