/** The conversations that this browser keeps. */
import { useState } from "preact/hooks";
import { Icon } from "../common/icons";
import type { Conversation } from "./conversation";
import { answering, conversations, currentId, remove, rename, select, startNew, version } from "./state";

const DAY = 86_400_000;

export function Sidebar({ done }: { done: () => void }) {
  void version.value;
  const [wanted, setWanted] = useState("");
  const found = conversations.value.filter((each) => matches(each, wanted.trim().toLowerCase()));
  return (
    <nav class="sidebar" aria-label="Conversations">
      <button
        class="secondary new-chat"
        onClick={() => {
          startNew();
          done();
        }}
      >
        <Icon name="plus" />
        New chat
        <kbd>Alt N</kbd>
      </button>
      <input
        type="search"
        placeholder="Search conversations"
        aria-label="Search conversations"
        value={wanted}
        onInput={(event) => setWanted(event.currentTarget.value)}
      />
      <div class="list">
        {byAge(found).map(([age, some]) => (
          <section key={age} aria-label={age}>
            <h2>{age}</h2>
            <ul>
              {some.map((each) => (
                <Entry key={each.id} conversation={each} done={done} />
              ))}
            </ul>
          </section>
        ))}
        {!found.length && <p class="hint">Nothing has these words.</p>}
      </div>
      <p class="hint foot">Kept in this browser only.</p>
    </nav>
  );
}

function matches(conversation: Conversation, wanted: string): boolean {
  if (!wanted || conversation.title.toLowerCase().includes(wanted)) return true;
  return Object.values(conversation.messages).some((each) => each.content.toLowerCase().includes(wanted));
}

function byAge(all: Conversation[]): [string, Conversation[]][] {
  const today = new Date().setHours(0, 0, 0, 0);
  const groups: Record<string, Conversation[]> = {};
  for (const each of all) {
    const age =
      each.updated >= today ? "Today" : each.updated >= today - DAY ? "Yesterday" : each.updated >= today - 7 * DAY ? "This week" : "Earlier";
    (groups[age] ??= []).push(each);
  }
  return Object.entries(groups);
}

function Entry({ conversation, done }: { conversation: Conversation; done: () => void }) {
  const [renaming, setRenaming] = useState(false);
  const [removing, setRemoving] = useState(false);
  if (renaming) {
    return (
      <li>
        <input
          class="rename"
          aria-label="Title"
          defaultValue={conversation.title}
          ref={(element) => element?.focus()}
          onBlur={(event) => {
            rename(conversation, event.currentTarget.value);
            setRenaming(false);
          }}
          onKeyDown={(event) => {
            if (event.key === "Enter") event.currentTarget.blur();
            if (event.key === "Escape") setRenaming(false);
          }}
        />
      </li>
    );
  }
  return (
    <li class={conversation.id === currentId.value ? "entry on" : "entry"}>
      <button
        class="entry-title"
        aria-current={conversation.id === currentId.value ? "true" : undefined}
        onClick={() => {
          select(conversation.id);
          done();
        }}
      >
        {answering.value?.conversation === conversation && <i class="spinner" aria-label="answering" />}
        {conversation.title}
      </button>
      <span class="entry-actions">
        <button class="ghost small" aria-label={`Rename ${conversation.title}`} title="Rename" onClick={() => setRenaming(true)}>
          <Icon name="edit" />
        </button>
        <button
          class={removing ? "ghost small danger" : "ghost small"}
          aria-label={removing ? `Delete ${conversation.title} for good` : `Delete ${conversation.title}`}
          title={removing ? "Press again to delete" : "Delete"}
          onClick={() => (removing ? void remove(conversation) : setRemoving(true))}
          onBlur={() => setRemoving(false)}
        >
          <Icon name="trash" />
        </button>
      </span>
    </li>
  );
}
