import { describe, expect, it } from 'vitest';
import { differing, shade, surprisal } from './tokens';

const token = (logprob: number | null) => ({ id: 1, text: 'a', logprob, special: false });

describe('surprisal', () => {
  it('is in bits', () => {
    expect(surprisal(token(Math.log(0.25)))).toBeCloseTo(2);
    expect(surprisal(token(null))).toBe(0);
  });
  it('becomes a shade from 0 to 5', () => {
    expect([0.99, 0.6, 0.3, 0.15, 0.05, 0.001].map((p) => shade(token(Math.log(p))))).toEqual([0, 1, 2, 3, 4, 5]);
  });
});

describe('differing', () => {
  it('marks what is no part of the common text', () => {
    expect(differing([1, 2, 3], [1, 2, 3])).toEqual(new Set());
    expect(differing([1, 2, 3], [1, 9, 3, 4])).toEqual(new Set([1, 3]));
    expect(differing([], [1])).toEqual(new Set([0]));
    expect(differing([1], [])).toEqual(new Set());
  });
  it('gives up on what would take too long', () => {
    expect(differing([1, 2, 3, 4], [5, 2, 3, 6], 3)).toEqual(new Set([0, 1, 2, 3]));
  });
});
