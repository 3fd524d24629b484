import { describe, expect, it } from 'vitest';
import { figuresOf, quantile, readingOf, total } from './serving';

const text = (requests: number, fast: number, all: number): string => `# HELP prelude_requests_total Requests.
prelude_requests_total{outcome="finished",task="a\\"}b",version="1"} ${requests}
prelude_requests_total{outcome="failed",task="c",version=""} 1.0
prelude_time_to_first_token_seconds_bucket{le="0.1",task="a"} ${fast}
prelude_time_to_first_token_seconds_bucket{le="0.5",task="a"} ${all}
prelude_time_to_first_token_seconds_bucket{le="+Inf",task="a"} ${all}
prelude_time_to_first_token_seconds_count{task="a"} ${all}
prelude_kv_cache_positions 1000.0
prelude_kv_cache_used_positions 250.0
process_open_fds 9.0
`;

describe('the figures of serving', () => {
  it('reads label values that have quotes and braces', () => {
    const reading = readingOf(text(3, 0, 0));
    expect(total(reading, 'requests_total')).toBe(4);
    expect(reading.get('prelude_requests_total')![0]!.labels.task).toBe('a\\"}b');
    expect(reading.has('process_open_fds')).toBe(false);
  });
  it('takes rates and quantiles from what happened between two readings', () => {
    const [before, now] = [readingOf(text(10, 50, 50)), readingOf(text(30, 60, 70))];
    const figures = figuresOf(before, now, 10, 0);
    expect([figures.requests, figures.tokens, figures.kv]).toEqual([2, 2, 0.25]);
    expect(figures.p50).toBeCloseTo(0.1);
    expect(figures.p95).toBeCloseTo(0.1 + 0.4 * 0.9);
    expect([figures.hits, quantile(now, now, 'time_to_first_token_seconds', 0.5)]).toEqual([null, null]);
  });
  it('starts at zero where the server started again', () => {
    expect(figuresOf(readingOf(text(30, 0, 0)), readingOf(text(1, 0, 0)), 1, 0).requests).toBe(0);
  });
});
