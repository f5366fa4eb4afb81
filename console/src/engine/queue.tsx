/** The requests that run and wait. */
import { colours } from "../common/theme";
import { duration } from "./charts";
import { hue } from "./colours";
import { type EngineRequest, latest } from "./feed";

const MOST = 10;

export function Queue() {
  void colours.value;
  const now = latest.value;
  const all = now?.requests ?? [];
  const running = all.filter((each) => each.running);
  const waiting = all.filter((each) => !each.running);
  const load = now?.load;
  const more = (load?.num_requests_running ?? 0) - Math.min(MOST, running.length);
  return (
    <section class="card span-2" aria-labelledby="queue-title">
      <div class="card-head">
        <h2 id="queue-title">Queue</h2>
        <span class="hint">
          {load &&
            `${load.num_requests_running} of ${load.max_num_seqs} rows run, ${load.num_requests_waiting} wait` +
              (load.num_clients_waiting > 1 ? ` from ${load.num_clients_waiting} clients` : "") +
              `, ${load.num_steps_in_flight} ${load.num_steps_in_flight === 1 ? "step" : "steps"} in flight`}
        </span>
      </div>
      {running.length ? (
        <ul class="requests">
          {running.slice(0, MOST).map((each) => (
            <Row key={each.number} request={each} />
          ))}
        </ul>
      ) : (
        <p class="empty">{now?.state === "serving" ? "Nothing runs. Send something from the chat page." : "Nothing runs while no engine is attached."}</p>
      )}
      {more > 0 && running.length > 0 && <p class="hint">and {more} more that run</p>}
      {(load?.num_requests_waiting ?? 0) > 0 && (
        <p class="waiting" aria-label={`${load!.num_requests_waiting} requests wait`}>
          <span class="hint">Waiting</span>
          {waiting.map((each) => (
            <i key={each.number} title={`#${each.number}: ${each.num_prompt_tokens} prompt tokens, for ${duration(each.age)}`} style={{ background: hue(each.number) }} />
          ))}
          {load!.num_requests_waiting > waiting.length && <span class="hint">and {load!.num_requests_waiting - waiting.length} more</span>}
        </p>
      )}
      <p class="legend">
        <span class="key"><i class="seg cached" />prompt from the cache</span>
        <span class="key"><i class="seg prompt" />prompt computed</span>
        <span class="key"><i class="seg output" />generated</span>
      </p>
    </section>
  );
}

function Row({ request }: { request: EngineRequest }) {
  const total = Math.max(1, request.max_total_tokens);
  const share = (count: number) => `${Math.max(0, (count / total) * 100)}%`;
  const computed = Math.max(0, Math.min(request.num_computed_tokens, request.num_prompt_tokens) - request.num_cached_tokens);
  const title = `${request.num_prompt_tokens} prompt tokens (${request.num_cached_tokens} cached), ${request.num_output_tokens} generated, at most ${total} in all; ${request.num_blocks} blocks; client ${request.client}`;
  return (
    <li title={title}>
      <i class="dot" style={{ background: hue(request.number) }} />
      <span class="who">{request.request_id ? short(request.request_id) : `#${request.number}`}</span>
      <span class="bar" aria-hidden="true">
        <i class="seg cached" style={{ width: share(request.num_cached_tokens) }} />
        <i class="seg prompt" style={{ width: share(computed) }} />
        <i class="seg output" style={{ width: share(request.num_output_tokens), background: hue(request.number) }} />
      </span>
      <span class="count">{request.num_output_tokens} tok</span>
      <span class="count">{duration(request.age)}</span>
    </li>
  );
}

function short(id: string): string {
  return id.length > 14 ? `${id.slice(0, 12)}…` : id;
}
