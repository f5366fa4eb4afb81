/** Light, dark, or as the system has it. */
import { effect, signal } from "@preact/signals";

export type Theme = "system" | "light" | "dark";
const NAME = "pagewire.theme";
const NEXT: Record<Theme, Theme> = { system: "light", light: "dark", dark: "system" };

export const theme = signal<Theme>((localStorage.getItem(NAME) as Theme | null) ?? "system");
/** Counts the times that colours changed, for what draws with them. */
export const colours = signal(0);

const media = matchMedia("(prefers-color-scheme: dark)");
const systemIsDark = signal(media.matches);
media.addEventListener("change", (event) => {
  systemIsDark.value = event.matches;
});

effect(() => {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  localStorage.setItem(NAME, theme.value);
  colours.value = colours.peek() + 1;
});

export function nextTheme(): void {
  theme.value = NEXT[theme.value];
}

export function isDark(): boolean {
  return theme.value === "system" ? systemIsDark.value : theme.value === "dark";
}

/** A colour of the style sheet, for canvases. */
export function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
