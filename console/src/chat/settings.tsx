/** What a conversation is answered with: model, system prompt, sampling, thinking and tools. */
import { useState } from "preact/hooks";
import { Icon } from "../common/icons";
import { info, models } from "../common/server";
import { type Settings, readTools } from "./conversation";
import { current, set } from "./state";

interface Field {
  name: keyof Settings;
  label: string;
  hint: string;
  min?: number;
  max?: number;
  step?: number;
}

const SAMPLING: Field[] = [
  { name: "temperature", label: "Temperature", hint: "0 takes the likeliest token", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", hint: "the likeliest tokens that make up this share", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", hint: "this many likeliest tokens; 0 for all", min: 0, step: 1 },
  { name: "min_p", label: "Min p", hint: "tokens at least this likely, beside the likeliest", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Longest answer", hint: "in tokens", min: 1, step: 1 },
  { name: "seed", label: "Seed", hint: "the same seed, the same answer", step: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "1 is none", min: 0.01, max: 2, step: 0.05 },
  { name: "presence_penalty", label: "Presence penalty", hint: "-2 to 2", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "-2 to 2", min: -2, max: 2, step: 0.1 },
];

export function ModelPicker() {
  const settings = current.value?.settings;
  const bases = models.value.filter((each) => !each.parent);
  const adapters = models.value.filter((each) => each.parent);
  const chosen = models.value.some((each) => each.id === settings?.model) ? settings!.model : (models.value[0]?.id ?? "");
  return (
    <select
      class="model-picker"
      aria-label="Model"
      value={chosen}
      onChange={(event) => set("model", event.currentTarget.value)}
    >
      {!models.value.length && <option value="">no model yet</option>}
      {bases.map((each) => (
        <option key={each.id} value={each.id}>
          {each.id}
        </option>
      ))}
      {adapters.length > 0 && (
        <optgroup label="Adapters">
          {adapters.map((each) => (
            <option key={each.id} value={each.id}>
              {each.id} (on {each.parent})
            </option>
          ))}
        </optgroup>
      )}
    </select>
  );
}

export function SettingsPanel({ close }: { close: () => void }) {
  const settings = current.value?.settings;
  if (!settings) return null;
  const engine = info.value?.engine;
  return (
    <aside class="settings" aria-label="Settings of this conversation">
      <div class="panel-head">
        <h2>Settings</h2>
        <button class="ghost" aria-label="Close settings" onClick={close}>
          <Icon name="close" />
        </button>
      </div>
      <label>
        Model
        <ModelPicker />
      </label>
      {engine && (
        <p class="hint">
          {engine.device}, {engine.dtype}; up to {engine.max_model_len.toLocaleString("en")} tokens.
        </p>
      )}
      <label>
        System prompt
        <textarea
          rows={4}
          placeholder="How the model is to behave"
          value={settings.system}
          onInput={(event) => set("system", event.currentTarget.value)}
        />
      </label>
      <h3>Sampling</h3>
      <p class="hint">What is empty is as the model has it.</p>
      <div class="fields">
        {SAMPLING.map((field) => (
          <Number key={field.name} field={field} value={settings[field.name]} />
        ))}
      </div>
      <label>
        Stop at
        <textarea
          rows={2}
          placeholder="one text on each line"
          value={settings.stop}
          onInput={(event) => set("stop", event.currentTarget.value)}
        />
      </label>
      <h3>Thinking</h3>
      <div class="fields">
        <label>
          Think first
          <select value={settings.thinking} onChange={(event) => set("thinking", event.currentTarget.value as Settings["thinking"])}>
            <option value="">as the model does</option>
            <option value="on">on</option>
            <option value="off">off</option>
          </select>
        </label>
        <label>
          Effort
          <select value={settings.effort} onChange={(event) => set("effort", event.currentTarget.value as Settings["effort"])}>
            <option value="">as the model does</option>
            <option>low</option>
            <option>medium</option>
            <option>high</option>
          </select>
        </label>
      </div>
      <h3>Tools</h3>
      <Tools value={settings.tools} />
      <button
        class="secondary"
        onClick={() => {
          for (const field of SAMPLING) set(field.name, "" as never);
          set("stop", "");
          set("thinking", "");
          set("effort", "");
        }}
      >
        Reset sampling
      </button>
    </aside>
  );
}

function Number({ field, value }: { field: Field; value: string }) {
  return (
    <label title={field.hint}>
      {field.label}
      <input
        type="number"
        min={field.min}
        max={field.max}
        step={field.step}
        value={value}
        placeholder="default"
        onInput={(event) => set(field.name, event.currentTarget.value as never)}
      />
    </label>
  );
}

const EXAMPLE = `[{"type": "function", "function": {
  "name": "get_weather",
  "description": "The weather in a city",
  "parameters": {"type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"]}}}]`;

function Tools({ value }: { value: string }) {
  const [wrong, setWrong] = useState("");
  return (
    <>
      <label>
        Functions, as OpenAI's API has them
        <textarea
          rows={5}
          class="mono"
          placeholder={EXAMPLE}
          value={value}
          onInput={(event) => {
            set("tools", event.currentTarget.value);
            try {
              readTools(event.currentTarget.value);
              setWrong("");
            } catch (error) {
              setWrong((error as Error).message);
            }
          }}
        />
      </label>
      {wrong ? <p class="error-text">{wrong}</p> : <p class="hint">The model's calls are shown, and you type what they return.</p>}
    </>
  );
}
