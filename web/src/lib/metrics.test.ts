import { describe, expect, it } from 'vitest';
import { metricsOf, nameOfMetric, valueOf } from './metrics';

describe('metrics', () => {
  it('put what was measured on test rows first', () => {
    const metrics = {
      validation_exact_match: 0.8,
      test_rows: 250,
      test_accuracy_choices: 0.868,
      test_sha256: 'a',
      odd: null,
    };
    expect(metricsOf(metrics).map(({ name }) => name)).toEqual(['test_accuracy_choices', 'validation_exact_match']);
    expect(metricsOf(undefined)).toEqual([]);
  });
  it('are written as people read them', () => {
    expect(nameOfMetric('test_accuracy_choices')).toBe('accuracy');
    expect(nameOfMetric('validation_exact_match')).toBe('exact match, validation');
    expect(valueOf({ name: 'test_bleu', value: 59.1797, interval: null })).toBe('59.18');
  });
  it('take an interval only if it is one', () => {
    expect(metricsOf({ a: 1, a_interval: [0, 2] })[0]?.interval).toEqual([0, 2]);
    expect(metricsOf({ a: 1, a_interval: ['<b>', 2] })[0]?.interval).toBeNull();
  });
});
