/** Metrics of a manifest: the one that stands for all, and how each is written. */
import { count, percent } from './format';

export interface Metric {
  name: string;
  value: number;
  interval: [number, number] | null;
}

/** The most telling first; of a task's own measurements those on test rows come before those on validation rows. */
const ORDER = ['accuracy_choices', 'accuracy', 'accuracy_generated', 'rouge_l', 'bleu', 'exact_match', 'macro_f1'];
const WORDS: Record<string, string> = {
  accuracy_choices: 'accuracy',
  accuracy_generated: 'accuracy, generated',
  macro_f1_choices: 'macro-F1',
  macro_f1_generated: 'macro-F1, generated',
  rouge_l: 'ROUGE-L',
  bleu: 'BLEU',
  exact_match: 'exact match',
};

function rank({ name }: Metric): number {
  const plain = name.replace(/^(test|validation)_/, '');
  const at = ORDER.indexOf(plain);
  return (at < 0 ? ORDER.length : at) + (name.startsWith('test_') ? 0 : ORDER.length + 1);
}

export function metricsOf(metrics: Record<string, unknown> | null | undefined): Metric[] {
  const found = Object.entries(metrics ?? {}).filter(
    ([name, value]) => typeof value === 'number' && !name.endsWith('_rows'),
  );
  return found
    .map(([name, value]) => {
      const bounds = metrics?.[`${name}_interval`];
      const isInterval = Array.isArray(bounds) && bounds.length === 2 && bounds.every((one) => typeof one === 'number');
      return { name, value: value as number, interval: isInterval ? (bounds as [number, number]) : null };
    })
    .sort((a, b) => rank(a) - rank(b));
}

export function nameOfMetric(name: string): string {
  const [, where = '', plain = name] = /^(?:(test|validation)_)?(.*)$/.exec(name) ?? [];
  const word = WORDS[plain] ?? plain.replaceAll('_', ' ');
  return where === 'validation' ? `${word}, validation` : word;
}

export function valueOf({ name, value }: Metric): string {
  if (/accuracy|exact_match|f1|rouge/.test(name)) return percent(value);
  return Number.isInteger(value) ? count(value) : value.toPrecision(4);
}
