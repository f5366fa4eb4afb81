/** Markdown to HTML that is safe to show: rendered by markdown-it, cleaned by DOMPurify. */
import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import markdown from "highlight.js/lib/languages/markdown";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import MarkdownIt from "markdown-it";

const LANGUAGES = { bash, cpp, css, diff, go, java, javascript, json, markdown, python, rust, sql, typescript, xml, yaml };
for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language);

const renderer = new MarkdownIt({ html: false, linkify: true, breaks: false, highlight });

function highlight(code: string, language: string): string {
  if (!hljs.getLanguage(language)) return "";
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

renderer.renderer.rules.fence = (tokens, index, options) => {
  const token = tokens[index]!;
  const language = token.info.trim().split(/\s+/)[0] ?? "";
  const name = renderer.utils.escapeHtml(language || "text");
  const code = options.highlight?.(token.content, language, "") || renderer.utils.escapeHtml(token.content);
  return (
    `<div class="code"><div class="code-bar"><span>${name}</span>` +
    `<button type="button" class="code-copy">Copy</button></div>` +
    `<pre tabindex="0" aria-label="Code, ${name}"><code class="hljs">${code}</code></pre></div>`
  );
};

// A picture would be fetched from wherever the model says: it becomes a link instead.
renderer.renderer.rules.image = (tokens, index) => {
  const token = tokens[index]!;
  const url = renderer.utils.escapeHtml(String(token.attrGet("src") ?? ""));
  const label = renderer.utils.escapeHtml(token.content || "picture");
  return `<a href="${url}">${label}</a>`;
};

renderer.renderer.rules.table_open = () => '<div class="table" tabindex="0" role="group" aria-label="Table"><table>';
renderer.renderer.rules.table_close = () => "</table></div>";

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

export function toHtml(text: string): string {
  return DOMPurify.sanitize(renderer.render(text), {
    USE_PROFILES: { html: true },
    FORBID_TAGS: ["style", "form", "img", "video", "audio", "iframe"],
    FORBID_ATTR: ["style"],
  });
}
