/** What a soft prompt means, in the rows that pictures and tables show. */
import type { Schemas } from '../api/client';

export type Static = Schemas['Interpretation'];
export type Causal = Schemas['CausalInterpretation'];
export type Interval = Schemas['Interval'];
export type LabelTest = Schemas['LabelTest'];
export type Removal = Schemas['Removal'];

/** One virtual token: what is known of it without data, and what an experiment found. */
export interface VirtualToken {
  token: number;
  geometry: Schemas['VirtualTokenGeometry'] | null;
  nearest: Schemas['NearestOfToken'] | null;
  removal: Removal | null;
}

export function virtualTokens(found: Static, causal: Causal | null): VirtualToken[] {
  const removals = new Map((causal?.necessity?.tokens ?? []).map((one) => [one.token, one]));
  return Array.from({ length: found.num_virtual_tokens }, (_, token) => ({
    token,
    geometry: found.geometry?.tokens?.[token] ?? null,
    nearest: found.nearest?.tokens[token] ?? null,
    removal: removals.get(token) ?? null,
  }));
}

/** A p-value with as many digits as it has. */
export function writtenP(p: number | null | undefined): string {
  if (p === null || p === undefined) return '–';
  if (p < 0.001) return p.toPrecision(1);
  return p < 0.01 ? p.toFixed(3) : p.toFixed(2);
}

/** A number with its sign, which a minus in hyphens would hide. */
export const signed = (value: number, digits = 2): string => {
  const written = Math.abs(value).toFixed(digits);
  return Number(written) === 0 ? written : `${value < 0 ? '−' : '+'}${written}`;
};

export const minus = (value: number, digits = 2): string => value.toFixed(digits).replace('-', '−');

/** A sentence of the server as a typographer sets it: minus signs, and no line break within `p = 0.2`. */
export const typeset = (text: string): string =>
  text.replace(/(^|[\s(])-(?=\d)/g, '$1−').replace(/ (?==)|(?<==) /g, '\u00a0');

/** A scale from values to percent of a width, wide enough for all of them and for `always`. */
export interface Scale {
  low: number;
  high: number;
  at: (value: number) => number;
}

export function scaleOf(values: number[], always: number[] = [0]): Scale {
  const all = [...values, ...always].filter(Number.isFinite);
  const low = Math.min(...all);
  const high = Math.max(...all);
  const pad = 0.04 * (high - low || 1);
  const [from, to] = [low - pad, high + pad];
  return { low: from, high: to, at: (value) => (100 * (value - from)) / (to - from) };
}

/** The label tests that were made, the main one first, with what each says. */
export function labelTests(lens: Schemas['Lens']): { name: string; test: LabelTest; isControl: boolean }[] {
  const tests: [string, LabelTest | null | undefined, boolean][] = [
    [`labels, layers ${lens.first_layer} to ${lens.num_layers - 1}`, lens.labels, false],
    ['labels, all layers', lens.all_layers, false],
    ['control: a form that is not answered', lens.control_form, true],
    ['control: the start alone', lens.control_start, true],
  ];
  return tests.flatMap(([name, test, isControl]) => (test ? [{ name, test, isControl }] : []));
}

/** The steps of the ladder, by what they keep; without a ratio by their quality. */
export function ladder(found: Schemas['Sufficiency']): { name: string; value: Interval }[] {
  const hasRatio = found.steps.every(({ ratio }) => ratio);
  return found.steps.map(({ name, quality, ratio }) => ({ name, value: (hasRatio && ratio) || quality }));
}

export const hasRatios = (found: Schemas['Sufficiency']): boolean => found.steps.every(({ ratio }) => ratio);

/** Of each virtual token the sum over the output, and the strongest first. */
export function strongest(influence: number[][]): { token: number; sum: number }[] {
  return influence
    .map((row, token) => ({ token, sum: row.reduce((sum, value) => sum + value, 0) }))
    .sort((a, b) => b.sum - a.sum);
}
