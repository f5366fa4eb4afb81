/** The prefix cache: what is shared lies left, what parts from it to the right of it. */
import { useSignal } from "@preact/signals";
import { info } from "../common/server";
import { colours } from "../common/theme";
import { hue } from "./colours";
import { type PrefixNode, latest, prefixes } from "./feed";

const ROW = 22;
const MOST_ROWS = 12;

interface Placed {
  node: PrefixNode;
  index: number;
  root: number;
  /** In blocks. */
  begin: number;
  row: number;
  rows: number;
}

/** The first nodes, which are the largest and most wanted, as many as there are rows for. */
function placeFirst(nodes: PrefixNode[]) {
  let count = nodes.length;
  let placed = place(nodes);
  while (placed.rows > MOST_ROWS) placed = place(nodes.slice(0, --count));
  return placed;
}

/** Puts every leaf into a row of its own and every other node beside its children. */
function place(nodes: PrefixNode[]): { placed: Placed[]; depth: number; rows: number } {
  const children = new Map<number, number[]>();
  nodes.forEach(([, parent], index) => children.set(parent, [...(children.get(parent) ?? []), index]));
  const placed: Placed[] = [];
  let rows = 0;
  let depth = 1;
  function visit(index: number, begin: number, root: number): void {
    const node = nodes[index]!;
    const entry: Placed = { node, index, root, begin, row: rows, rows: 1 };
    placed.push(entry);
    depth = Math.max(depth, begin + node[2]);
    const behind = children.get(index) ?? [];
    for (const child of behind) visit(child, begin + node[2], root);
    if (!behind.length) rows++;
    entry.rows = rows - entry.row;
  }
  for (const root of children.get(-1) ?? []) visit(root, 0, root);
  return { placed, depth, rows };
}

export function PrefixTree() {
  const under = useSignal("");
  void colours.value;
  const tree = prefixes.value;
  const totals = latest.value?.totals;
  const size = info.value?.engine?.block_size ?? 16;
  const { placed, depth, rows } = placeFirst(tree?.nodes ?? []);
  const rate = totals?.prefix_queries ? (totals.prefix_hits / totals.prefix_queries) * 100 : null;
  const left = (tree?.num_left_out ?? 0) + (tree ? tree.nodes.length - placed.length : 0);
  return (
    <section class="card span-3" aria-labelledby="prefix-title">
      <div class="card-head">
        <h2 id="prefix-title">Prefix tree</h2>
        <span class="hint">{rate === null ? "nothing was looked up yet" : `${rate.toFixed(1)} % of all looked-up tokens were hits`}</span>
      </div>
      {placed.length ? (
          <ul class="tree" aria-label="Cached prefixes" style={{ height: `${rows * ROW}px` }} onPointerLeave={() => (under.value = "")}>
            {placed.map((each) => (
              <li
                key={each.node[0]}
                class={each.node[4] ? "held" : undefined}
                style={{
                  left: `${(each.begin / depth) * 100}%`,
                  width: `max(3px, calc(${(each.node[2] / depth) * 100}% - 2px))`,
                  top: `${each.row * ROW}px`,
                  height: `${each.rows * ROW - 2}px`,
                  "--hue": hue(nodes(each.root)),
                  "--hits": `${Math.min(100, 18 + 16 * Math.log2(1 + each.node[3]))}%`,
                }}
                onPointerEnter={() => (under.value = describe(each, size))}
              >
                <span>
                  {each.node[3] > 0 && <b>{each.node[3]}×</b>} {each.node[2] * size} tok
                </span>
              </li>
            ))}
          </ul>
      ) : (
        <p class="empty">Nothing is cached yet. A block comes here when it is full.</p>
      )}
      <p class="legend">
        {under.value ? (
          <span>{under.value}</span>
        ) : (
          <span>
            Width is length in tokens; the stronger the colour, the more often requests found it; outlined is what requests hold now.
            {left > 0 && ` ${left} smaller ones are not shown.`}
          </span>
        )}
      </p>
    </section>
  );

  function nodes(index: number): number {
    return tree!.nodes[index]![0];
  }
}

function describe({ node, begin }: Placed, size: number): string {
  const [first, , count, hits, held] = node;
  return `From block ${first}: tokens ${begin * size} to ${(begin + count) * size}, found ${hits} ${hits === 1 ? "time" : "times"}, ${held} of ${count} blocks are held now`;
}
