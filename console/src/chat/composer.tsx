/** Where the user writes. */
import { useEffect, useRef } from "preact/hooks";
import { Icon } from "../common/icons";
import { info } from "../common/server";
import { path } from "./conversation";
import { answering, current, currentId, send, stop } from "./state";

const TALLEST = 240;

export function Composer() {
  const field = useRef<HTMLTextAreaElement>(null);
  const busy = answering.value !== null;
  const task = info.value?.engine?.task ?? "generate";

  function fit() {
    const area = field.current!;
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight, TALLEST)}px`;
  }

  function submit() {
    const area = field.current!;
    if (busy || !area.value.trim()) return;
    send(area.value);
    area.value = "";
    fit();
  }

  function onKeyDown(event: KeyboardEvent) {
    const area = field.current!;
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && !area.value) {
      const last = path(current.value!).findLast((each) => each.role === "user");
      const button = last && document.querySelector<HTMLButtonElement>(`[data-id="${last.id}"] [aria-label="Edit"]`);
      if (button) {
        event.preventDefault();
        button.click();
      }
    }
  }

  const selected = currentId.value;
  useEffect(() => {
    if (matchMedia("(pointer: fine)").matches) field.current!.focus();
  }, [selected]);

  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        submit();
      }}
    >
      <textarea
        ref={field}
        rows={1}
        aria-label="Your message"
        placeholder={task === "generate" ? "Write a message" : "This model does not chat"}
        onInput={fit}
        onKeyDown={onKeyDown}
      />
      {busy ? (
        <button type="button" class="primary round" aria-label="Stop" title="Stop (Esc)" onClick={stop}>
          <Icon name="stop" />
        </button>
      ) : (
        <button class="primary round" aria-label="Send" title="Send (Enter)">
          <Icon name="send" />
        </button>
      )}
    </form>
  );
}
