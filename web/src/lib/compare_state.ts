/** The state of Compare, as the address has it: everything but the answers and the key. */
import type { ManyBody } from './comparison.svelte';
import { nameOf } from './targets';

export type Mode = 'plain' | 'surprise' | 'differences';
export const MODES: Mode[] = ['plain', 'surprise', 'differences'];

export interface CompareState {
  text: string;
  /** Tasks, task@version, or '' for the frozen model. */
  targets: string[];
  maxNewTokens: number | null;
  temperature: number | null;
  mode: Mode;
  /** Score the task's labels instead of generating. */
  labels: boolean;
}

export const MOST_TARGETS = 32;

function number(query: URLSearchParams, name: string): number | null {
  const value = query.get(name);
  return value === null || value === '' || Number.isNaN(Number(value)) ? null : Number(value);
}

export function stateOf(query: URLSearchParams): CompareState {
  const mode = query.get('show') as Mode;
  return {
    text: query.get('text') ?? '',
    targets: query.getAll('with').slice(0, MOST_TARGETS),
    maxNewTokens: number(query, 'max'),
    temperature: number(query, 'temperature'),
    mode: MODES.includes(mode) ? mode : 'surprise',
    labels: query.get('labels') !== '0',
  };
}

export function queryOf(state: CompareState): URLSearchParams {
  const query = new URLSearchParams();
  if (state.text) query.set('text', state.text);
  for (const target of state.targets) query.append('with', target);
  if (state.maxNewTokens !== null) query.set('max', String(state.maxNewTokens));
  if (state.temperature !== null) query.set('temperature', String(state.temperature));
  if (state.mode !== 'surprise') query.set('show', state.mode);
  if (!state.labels) query.set('labels', '0');
  return query;
}

/**
 * The requests of a comparison, each with the places of its columns. A task scores its own labels, and one without labels
 * generates; the frozen model does what the first task does.
 */
export function requestsOf(
  state: CompareState,
  labelsOf: Record<string, string[]>,
): { body: ManyBody; places: number[] }[] {
  const first = state.targets.map(nameOf).find(Boolean) ?? '';
  const groups = new Map<string, { body: ManyBody; places: number[] }>();
  state.targets.forEach((task, place) => {
    const labels = state.labels ? (labelsOf[nameOf(task) || first] ?? []) : [];
    const key = JSON.stringify(labels);
    const group = groups.get(key) ?? {
      body: { inputs: state.text, targets: [], parameters: labels.length ? { choices: labels } : generationOf(state) },
      places: [],
    };
    group.body.targets.push(task ? { task } : {});
    group.places.push(place);
    groups.set(key, group);
  });
  return [...groups.values()];
}

function generationOf({ maxNewTokens, temperature }: CompareState): ManyBody['parameters'] {
  return {
    details: true,
    top_n_tokens: 5,
    ...(maxNewTokens === null ? {} : { max_new_tokens: maxNewTokens }),
    ...(temperature === null ? {} : { temperature }),
  };
}
