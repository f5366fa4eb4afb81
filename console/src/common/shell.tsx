/** What both pages have: the bar at the top, and the dialog that asks for a key. */
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { apiKey, keyWanted, setApiKey } from "./api";
import { Icon } from "./icons";
import iconUrl from "./icon.svg?no-inline";
import { state } from "./server";
import { nextTheme, theme } from "./theme";

const THEMES = { system: "system", light: "sun", dark: "moon" } as const;

export function TopBar(props: { page: "chat" | "engine"; left?: ComponentChildren; children?: ComponentChildren }) {
  const page = (name: "chat" | "engine", href: string, label: string) => (
    <a href={href} class="tab" aria-current={props.page === name ? "page" : undefined}>
      <Icon name={name} />
      <span>{label}</span>
    </a>
  );
  return (
    <header class="topbar">
      {props.left}
      <a class="brand" href="./" aria-label="pagewire">
        <img src={iconUrl} alt="" width="24" height="24" />
        <span>pagewire</span>
      </a>
      <nav aria-label="Pages">
        {page("chat", "./", "Chat")}
        {page("engine", "./engine", "Engine")}
        <a href="./docs" class="tab wide-only">
          <Icon name="code" />
          <span>API</span>
        </a>
      </nav>
      <div class="topbar-end">
        {props.children}
        <StatePill />
        <button class="ghost" onClick={nextTheme} aria-label={`Colours: ${theme.value}`} title={`Colours: ${theme.value}`}>
          <Icon name={THEMES[theme.value]} />
        </button>
      </div>
    </header>
  );
}

function StatePill() {
  const now = state.value;
  const label = now.kind === "ready" ? "Serving" : now.kind === "checking" ? "Connecting" : "Not ready";
  return (
    <span class={`pill ${now.kind}`} role="status" title={now.kind === "away" ? now.why : undefined}>
      <i aria-hidden="true" />
      {label}
    </span>
  );
}

export function KeyDialog() {
  const dialog = useRef<HTMLDialogElement>(null);
  const why = keyWanted.value;
  useEffect(() => {
    if (why !== null && !dialog.current!.open) dialog.current!.showModal();
    if (why === null && dialog.current!.open) dialog.current!.close();
  }, [why]);
  function submit(event: SubmitEvent) {
    event.preventDefault();
    setApiKey(String(new FormData(event.target as HTMLFormElement).get("key") ?? "").trim());
  }
  return (
    <dialog ref={dialog} class="dialog" aria-labelledby="key-title">
      <form onSubmit={submit}>
        <h2 id="key-title">This server asks for an API key</h2>
        <p>It stays in this tab and is forgotten when you close it.</p>
        {why && <p class="error-text" role="alert">{why}</p>}
        <label>
          API key
          <input name="key" type="password" autocomplete="off" required defaultValue={apiKey.peek()} />
        </label>
        <div class="row end">
          <button class="primary" type="submit">Continue</button>
        </div>
      </form>
    </dialog>
  );
}
