/** Conversations in the browser's IndexedDB. They never leave it but as requests to this server. */
import type { Conversation } from "./conversation";

const NAME = "pagewire";
const STORE = "conversations";

let opened: Promise<IDBDatabase> | null = null;

function open(): Promise<IDBDatabase> {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run<T>(mode: IDBTransactionMode, action: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const database = await open();
  return new Promise((resolve, reject) => {
    const request = action(database.transaction(STORE, mode).objectStore(STORE));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** All conversations, the last changed first. */
export async function loadAll(): Promise<Conversation[]> {
  const all = await run<Conversation[]>("readonly", (store) => store.getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

export async function save(conversation: Conversation): Promise<void> {
  await run("readwrite", (store) => store.put(structuredClone(conversation)));
}

export async function remove(id: string): Promise<void> {
  await run("readwrite", (store) => store.delete(id));
}
