/** The state of Compare, as the address has it: everything but the answers and the key. */
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
