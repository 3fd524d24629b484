/** The result of an evaluation, as rows with a value, its interval and both in words. */
import { count, LEVEL, percent } from './format';
import { minus, scaleOf, signed, type Scale } from './interpretation';
import { nameOfMetric } from './metrics';

interface Figure {
  value: number | null;
  interval: [number | null, number | null];
}
type Difference = Figure & { verdict: string };

/** As `prelude eval --json` writes it. */
export interface Result {
  rows: number;
  data: string;
  model: string;
  dtype: string;
  digest: string;
  kind: 'classification' | 'text';
  known_from?: 'training' | 'validation';
  contestants: Record<string, Record<string, unknown>>;
  labels?: Record<string, { correct: number; rows: number }>;
}

export interface Row {
  name: string;
  value: number;
  low: number;
  high: number;
  /** The value and its interval, as text. */
  written: string;
  interval: string;
  /** In a difference: better, worse, or no difference shown. */
  verdict: string;
}

/** One metric with a row for each contestant, on a scale that they share. */
export interface Group {
  metric: string;
  scale: Scale;
  /** Positions that every row marks: 0, and for shares also 100 %. */
  marks: number[];
  rows: Row[];
}

const NUMBERS = ['bleu', 'perplexity'];
const isShare = (metric: string): boolean => !NUMBERS.includes(metric);
const isFigure = (found: unknown): found is Figure =>
  typeof found === 'object' && found !== null && 'interval' in found;

const written = (metric: string, value: number): string =>
  isShare(metric) ? percent(value) : minus(value, Math.abs(value) < 1000 ? 1 : 0);
const bare = (metric: string, value: number): string => minus(isShare(metric) ? 100 * value : value, 1);

function row(metric: string, name: string, figure: Figure, isDifference: boolean): Row[] {
  const [low, high] = figure.interval;
  const { value } = figure;
  if (value === null || low === null || high === null) return [];
  const points = isShare(metric) ? ' points' : '';
  return [
    {
      name,
      value,
      low,
      high,
      written: isDifference ? `${signed(isShare(metric) ? 100 * value : value, 1)}${points}` : written(metric, value),
      interval: `${bare(metric, low)} to ${bare(metric, high)}`,
      verdict: isDifference ? (figure as Difference).verdict : '',
    },
  ];
}

function group(metric: string, rows: Row[], isDifference: boolean): Group[] {
  if (!rows.length) return [];
  const values = rows.flatMap(({ value, low, high }) => [value, low, high]);
  const marks = !isDifference && isShare(metric) ? [0, 1] : [0];
  return [{ metric: nameOfMetric(metric), scale: scaleOf(values, marks), marks, rows }];
}

/** The metrics of a result, the one that decides the verdict first. */
function metricsOf({ contestants, kind }: Result): string[] {
  const [first = {}] = Object.values(contestants);
  const main = kind === 'classification' ? 'accuracy_choices' : 'rouge_l';
  const names = Object.keys(first).filter((name) => isFigure(first[name]));
  return names.sort((a, b) => Number(b === main) - Number(a === main));
}

/** Every metric of every contestant. */
export function figures(result: Result): Group[] {
  const all = Object.entries(result.contestants);
  return metricsOf(result).flatMap((metric) =>
    group(
      metric,
      all.flatMap(([name, of]) => (isFigure(of[metric]) ? row(metric, name, of[metric], false) : [])),
      false,
    ),
  );
}

/** The advantage of the first contestant over each other one, on the same rows. */
export function differences(result: Result): Group[] {
  const all = Object.entries(result.contestants).slice(1);
  return metricsOf(result).flatMap((metric) =>
    group(
      metric,
      all.flatMap(([name, { difference }]) => {
        const found = (difference as Record<string, unknown> | undefined)?.[metric];
        return isFigure(found) ? row(metric, name, found, true) : [];
      }),
      true,
    ),
  );
}

/** What the main metric says, one sentence for each comparison, or one for the only contestant. */
export function sentences(result: Result): string[] {
  const [subject = ''] = Object.keys(result.contestants);
  const [main] = figures(result);
  const [compared] = differences(result);
  if (compared) {
    return compared.rows.map(({ name, written, interval, verdict }) => {
      const start =
        verdict === 'no difference shown'
          ? `No difference shown between ${subject} and ${name}`
          : `${subject} is ${verdict} than ${name}`;
      return `${start}: ${compared.metric} ${written}, ${LEVEL} interval ${interval}.`;
    });
  }
  const only = main?.rows[0];
  return only ? [`${subject}: ${main.metric} ${only.written}, ${LEVEL} interval ${only.interval}.`] : [];
}

/** How often each label was right, the worst first. */
export function byLabel({ labels }: Result): { label: string; share: number; written: string }[] {
  return Object.entries(labels ?? {})
    .map(([label, { correct, rows }]) => ({
      label,
      share: rows ? correct / rows : 0,
      written: `${count(correct)} of ${count(rows)}`,
    }))
    .sort((a, b) => a.share - b.share);
}

/** A form of POST /evaluations, without its files. */
export interface Order {
  /** The task, or task@version. */
  task: string;
  /** Another version of the same task; null for none. */
  against: number | null;
  zeroShot: boolean;
  instructed: boolean;
  shots: number | null;
  instruction: string;
  limit: number | null;
}

export function fieldsOf(order: Order): Record<string, string> {
  const baselines = [
    order.against ? `@${order.against}` : '',
    order.zeroShot ? 'zero-shot' : '',
    order.instructed ? 'instruction' : '',
    order.shots ? `${order.shots}-shot` : '',
  ].filter(Boolean);
  return {
    task: order.task,
    ...(baselines.length ? { baselines: baselines.join(',') } : {}),
    ...((order.instructed || order.shots) && order.instruction.trim() ? { instruction: order.instruction } : {}),
    ...(order.limit ? { limit: String(order.limit) } : {}),
  };
}

/** The same as a command, which evaluates without the server. */
export function commandOf(order: Order, data: string, shots: string | null, quote: (text: string) => string): string {
  const { task = '', ...options } = fieldsOf(order);
  const given = Object.entries({ data, ...options, ...(shots && order.shots ? { 'shots-data': shots } : {}) });
  return `prelude eval ${quote(task)} ${given.map(([name, value]) => `--${name} ${quote(value)}`).join(' ')}`;
}
