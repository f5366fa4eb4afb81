import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig } from "vite";

const SOURCES = ["engine.html", "index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.js"];
const STATIC = "../frontend/http/console/static";

/** Writes what the build was made from, so that a test without Node can say whether it is current. */
function recordSources() {
  return {
    name: "record-sources",
    closeBundle() {
      const inside = readdirSync("src", { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile())
        .map((entry) => join(entry.parentPath, entry.name));
      const hash = createHash("sha256");
      for (const name of [...SOURCES, ...inside].sort()) hash.update(name + "\0").update(readFileSync(name));
      writeFileSync(join(STATIC, "sources.sha256"), hash.digest("hex") + "\n");
    },
  };
}

export default defineConfig({
  base: "./",
  plugins: [recordSources()],
  build: {
    outDir: STATIC,
    emptyOutDir: true,
    assetsInlineLimit: 0,
    target: "es2022",
    modulePreload: { polyfill: false },
    rollupOptions: { input: ["index.html", "engine.html"] },
  },
  server: {
    proxy: Object.fromEntries(
      ["/v1", "/server_info", "/engine/events"].map((path) => [path, "http://127.0.0.1:8000"]),
    ),
  },
});
