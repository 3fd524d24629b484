import { describe, expect, it } from 'vitest';
import { nearest, ticks } from './scale';

describe('the ticks of an axis', () => {
  it('are round and span the range', () => {
    expect(ticks(0, 3.2)).toEqual([0, 1, 2, 3, 4]);
    expect(ticks(0.42, 0.57)).toEqual([0.4, 0.45, 0.5, 0.55, 0.6]);
    expect(ticks(0, 600)).toEqual([0, 200, 400, 600]);
    expect(ticks(2, 2).length).toBeGreaterThan(1);
    expect(ticks(0, 0).length).toBeGreaterThan(1);
  });
  it('find what is nearest', () => {
    expect(nearest([1, 5, 9], 6)).toBe(1);
    expect(nearest([], 6)).toBe(0);
  });
});
