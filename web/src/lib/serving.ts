/** What /metrics says about serving: a few figures from two readings of it. */

/** Samples of one reading: by metric, all of its label sets. */
export type Reading = Map<string, { labels: Record<string, string>; value: number }[]>;

export interface Figures {
  /** Seconds since the page was opened. */
  at: number;
  requests: number;
  tokens: number;
  /** Of first tokens in the window, in seconds; null if there was none. */
  p50: number | null;
  p95: number | null;
  running: number;
  waiting: number;
  /** Shares; prefix hits are those in the window, null if nothing looked for one. */
  kv: number;
  hits: number | null;
}

const LINE = /^([\w:]+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Prometheus's text format. Only what begins with `prelude_` is kept. */
export function readingOf(text: string): Reading {
  const found: Reading = new Map();
  for (const line of text.split('\n')) {
    if (!line.startsWith('prelude_')) continue;
    const [, name, labels = '', value] = LINE.exec(line) ?? [];
    if (!name) continue;
    const pairs = [...labels.matchAll(LABEL)].map(([, label, text]) => [label!, text!]);
    const sample = { labels: Object.fromEntries(pairs) as Record<string, string>, value: Number(value) };
    const all = found.get(name);
    if (all) all.push(sample);
    else found.set(name, [sample]);
  }
  return found;
}

export function total(reading: Reading, name: string): number {
  return (reading.get(`prelude_${name}`) ?? []).reduce((sum, { value }) => sum + value, 0);
}

/** How many observations are at most each bound, over all label sets. */
function cumulative(reading: Reading, name: string): Map<number, number> {
  const found = new Map<number, number>();
  for (const { labels, value } of reading.get(`prelude_${name}_bucket`) ?? []) {
    const bound = labels.le === '+Inf' ? Infinity : Number(labels.le);
    found.set(bound, (found.get(bound) ?? 0) + value);
  }
  return found;
}

/**
 * A quantile of what a histogram observed between two readings, linear within its bucket, as Prometheus's
 * `histogram_quantile` has it; null if it observed nothing.
 */
export function quantile(before: Reading, now: Reading, name: string, share: number): number | null {
  const earlier = cumulative(before, name);
  const counts = [...cumulative(now, name)]
    .map(([bound, count]) => ({ bound, count: count - (earlier.get(bound) ?? 0) }))
    .sort((a, b) => a.bound - b.bound);
  const all = counts.at(-1)?.count ?? 0;
  if (all <= 0) return null;
  const wanted = share * all;
  let [low, below] = [0, 0];
  for (const { bound, count } of counts) {
    if (count >= wanted) {
      if (bound === Infinity) return low;
      return low + ((bound - low) * (wanted - below)) / Math.max(1e-9, count - below);
    }
    [low, below] = [bound, count];
  }
  return low;
}

/** Rates and latencies between `before` and `now`, `elapsed` seconds apart; all else as it is now. */
export function figuresOf(before: Reading, now: Reading, elapsed: number, at: number): Figures {
  // A server that started again counts from zero.
  const rise = (name: string): number => Math.max(0, total(now, name) - total(before, name));
  const rate = (...names: string[]): number =>
    names.reduce((sum, name) => sum + rise(name), 0) / Math.max(1e-3, elapsed);
  const looked = rise('prefix_cache_hits_total') + rise('prefix_cache_misses_total');
  return {
    at,
    requests: rate('requests_total'),
    // Counted as they come; output_tokens_total counts them at the end of their request.
    tokens: rate('inter_token_seconds_count', 'time_to_first_token_seconds_count'),
    p50: quantile(before, now, 'time_to_first_token_seconds', 0.5),
    p95: quantile(before, now, 'time_to_first_token_seconds', 0.95),
    running: total(now, 'requests_running'),
    waiting: total(now, 'requests_waiting'),
    kv: total(now, 'kv_cache_used_positions') / Math.max(1, total(now, 'kv_cache_positions')),
    hits: looked ? rise('prefix_cache_hits_total') / looked : null,
  };
}
