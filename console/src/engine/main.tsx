import { render } from "preact";
import "../common/base.css";
import { info, models, replicas, watchServer } from "../common/server";
import { KeyDialog, TopBar } from "../common/shell";
import { BlockMap } from "./blockmap";
import { Charts, duration, short } from "./charts";
import "./engine.css";
import { connection, latest, samples, startWatching, steps, why } from "./feed";
import { PrefixTree } from "./prefixtree";
import { Queue } from "./queue";
import { Timeline } from "./timeline";

function Page() {
  return (
    <div class="engine-page">
      <TopBar page="engine" />
      <main>
        <h1 class="unseen">Engine</h1>
        <Facts />
        <Trouble />
        <Tiles />
        <div class="cards">
          <BlockMap />
          <Queue />
          <Charts />
          <Timeline />
          <PrefixTree />
          <Parts />
        </div>
      </main>
      <KeyDialog />
    </div>
  );
}

function Facts() {
  const engine = info.value?.engine;
  if (!engine) return null;
  const facts: [string, string][] = [
    ["Model", models.value[0]?.id ?? engine.model],
    ["Device", engine.device],
    ["Precision", engine.dtype],
    ["Context", `${engine.max_model_len.toLocaleString("en")} tokens`],
    ["KV pool", `${engine.num_blocks.toLocaleString("en")} blocks of ${engine.block_size}`],
    ["At once", `${engine.max_num_seqs} requests, ${engine.max_num_batched_tokens.toLocaleString("en")} tokens a step`],
    ["pagewire", info.value!.version],
  ];
  return (
    <dl class="facts">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

function Trouble() {
  const now = latest.value;
  const said =
    connection.value === "lost"
      ? `Nothing is heard from the server: ${why.value || "the stream ended"}. This page keeps trying.`
      : now?.state === "no_scheduler"
        ? `The scheduler is away: ${why.value}. Requests wait in the frontend and go on when it is back.`
        : now?.state === "no_engine"
          ? `No engine is attached. ${now.load.num_requests_waiting} requests keep their tokens and go on when it is back.`
          : "";
  if (!said) return null;
  return (
    <p class="trouble" role="alert">
      <i class="spinner" aria-hidden="true" />
      {said}
    </p>
  );
}

function Tiles() {
  const now = latest.value;
  const last = samples.value.at(-1);
  const ttft = samples.value.findLast((each) => each.ttft)?.ttft;
  const itl = samples.value.findLast((each) => each.itl)?.itl;
  const totals = now?.totals;
  const used = now?.load.num_blocks ? (now.load.num_used_blocks / now.load.num_blocks) * 100 : null;
  const hits = totals?.prefix_queries ? (totals.prefix_hits / totals.prefix_queries) * 100 : null;
  const tiles: [string, string, string][] = [
    ["Tokens a second", last?.generated == null ? "–" : short(last.generated), "generated"],
    ["Running", now ? String(now.load.num_requests_running) : "–", now ? `${now.load.num_requests_waiting} waiting` : ""],
    ["KV held", used === null ? "–" : `${used.toFixed(used < 10 ? 1 : 0)} %`, totals ? `${short(totals.evictions)} evictions` : ""],
    ["Prefix hits", hits === null ? "–" : `${hits.toFixed(0)} %`, totals ? `${short(totals.prefix_hits)} tokens` : ""],
    ["First token", ttft ? duration(ttft.p50) : "–", "median"],
    ["Between tokens", itl ? duration(itl.p50) : "–", "median"],
    ["Ended", totals ? short(totals.ended_requests) : "–", totals ? `${short(totals.generated_tokens)} tokens` : ""],
    ["Engine lost", totals ? String(totals.worker_losses) : "–", totals ? `${short(totals.preemptions)} preemptions` : ""],
  ];
  return (
    <dl class="tiles">
      {tiles.map(([name, value, about]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
          <dd class="hint">{about}</dd>
        </div>
      ))}
    </dl>
  );
}

function Parts() {
  void latest.value;
  const ranks = steps.at(-1)?.execute_us.length ?? (latest.value?.state === "serving" ? 1 : 0);
  const adapters = models.value.filter((each) => each.parent);
  const several = replicas.value.length > 1;
  const attached = ranks ? `${ranks} ${ranks === 1 ? "rank" : "ranks"}` : "no engine attached";
  return (
    <div class="stack">
      <section class="card" aria-labelledby="replicas-title">
        <div class="card-head">
          <h2 id="replicas-title">Replicas</h2>
        </div>
        <ul class="parts">
          {several ? (
            replicas.value.map((each) => (
              <li key={each.name}>
                <b>replica {each.name}</b>
                <span class="hint">
                  {each.healthy ? `${each.open_requests} open requests of this frontend` : (each.reason ?? "away")}
                </span>
              </li>
            ))
          ) : (
            <li>
              <b>this scheduler</b>
              <span class="hint">{attached}</span>
            </li>
          )}
        </ul>
        {several && <p class="hint">The rest of this page shows one of them, the first that can be reached: {attached}.</p>}
      </section>
      <section class="card" aria-labelledby="adapters-title">
        <div class="card-head">
          <h2 id="adapters-title">Adapters</h2>
        </div>
        {adapters.length ? (
          <ul class="parts">
            {adapters.map((each) => (
              <li key={each.id}>
                <b>{each.id}</b>
                <span class="hint">
                  on {each.parent}
                  {each.root ? `, from ${each.root}` : ""}
                </span>
              </li>
            ))}
          </ul>
        ) : (
          <p class="hint">No adapter is loaded: every request is computed with the base model alone.</p>
        )}
      </section>
    </div>
  );
}

watchServer(15);
startWatching();
render(<Page />, document.getElementById("app")!);
