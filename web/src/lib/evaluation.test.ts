import { describe, expect, it } from 'vitest';
import { byLabel, commandOf, differences, fieldsOf, figures, sentences, type Order, type Result } from './evaluation';
import { shell } from './snippets';

const of = (value: number, low: number, high: number) => ({ value, interval: [low, high] as [number, number] });
const result = {
  rows: 8,
  kind: 'text',
  contestants: {
    'a@2': { perplexity: of(12.34, 10, 1500), rouge_l: of(0.5, 0.25, 0.75), seconds: 1 },
    '<b>': {
      perplexity: of(20, 18, 22),
      rouge_l: of(0.25, 0, 0.5),
      seconds: 1,
      difference: {
        perplexity: { ...of(-7.66, -9, -1), verdict: 'better' },
        rouge_l: { ...of(0.25, -0.1, 0.6), verdict: 'no difference shown' },
      },
    },
  },
} as unknown as Result;

describe('a result', () => {
  it('has the deciding metric first, shares in percent and other numbers as they are', () => {
    const [main, perplexity] = figures(result);
    expect(main).toMatchObject({
      metric: 'ROUGE-L',
      rows: [{ name: 'a@2', interval: '25.0 to 75.0' }, { name: '<b>' }],
    });
    expect(main!.rows[0]!.written).toMatch(/^50\.0\s%$/);
    expect(perplexity!.rows[0]!.written).toBe('12.3');
    expect(main!.scale.at(1)).toBeLessThan(100);
  });
  it('has differences in points, with their verdicts', () => {
    const [main, perplexity] = differences(result);
    expect(main!.rows).toMatchObject([{ name: '<b>', written: '+25.0 points', interval: '−10.0 to 60.0' }]);
    expect(perplexity!.rows).toMatchObject([{ written: '−7.7', verdict: 'better' }]);
  });
  it('is said in one sentence for each comparison', () => {
    expect(sentences(result)).toEqual([
      'No difference shown between a@2 and <b>: ROUGE-L +25.0 points, 95\u202f% interval −10.0 to 60.0.',
    ]);
    const alone = { ...result, contestants: { 'a@2': result.contestants['a@2']! } };
    expect(sentences(alone)[0]).toContain('a@2: ROUGE-L 50.0');
  });
  it('leaves out a figure that is no number, and sorts labels', () => {
    const broken = { ...result, contestants: { a: { rouge_l: { value: null, interval: [null, null] } } } };
    expect(figures(broken as Result)).toEqual([]);
    const labels = { good: { correct: 2, rows: 2 }, bad: { correct: 0, rows: 3 } };
    expect(byLabel({ ...result, labels }).map(({ label }) => label)).toEqual(['bad', 'good']);
  });
});

describe('an order', () => {
  const order: Order = {
    task: 'a@2',
    against: 1,
    zeroShot: true,
    instructed: false,
    shots: 4,
    instruction: "it's",
    limit: 5,
  };
  it('is a form, and a command', () => {
    const baselines = '@1,zero-shot,4-shot';
    expect(fieldsOf(order)).toEqual({ task: 'a@2', baselines, instruction: "it's", limit: '5' });
    expect(fieldsOf({ ...order, against: null, zeroShot: false, shots: null, limit: null })).toEqual({ task: 'a@2' });
    expect(commandOf(order, 'x y.jsonl', 'train.jsonl', shell)).toBe(
      `prelude eval 'a@2' --data 'x y.jsonl' --baselines '${baselines}' --instruction 'it'\\''s' --limit '5' --shots-data 'train.jsonl'`,
    );
  });
});
