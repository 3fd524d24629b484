import { describe, expect, it } from 'vitest';
import { queryOf, stateOf } from './compare_state';

describe('the address of Compare', () => {
  it('gives back the state that it was made of', () => {
    const state = {
      text: 'a & b = c#?\n🙂',
      targets: ['mood@2', '', 'mood'],
      maxNewTokens: 7,
      temperature: 0.5,
      mode: 'differences' as const,
      labels: false,
    };
    expect(stateOf(new URLSearchParams(String(queryOf(state))))).toEqual(state);
  });
  it('ignores what makes no sense', () => {
    const state = stateOf(new URLSearchParams('max=x&show=<b>&temperature='));
    expect([state.maxNewTokens, state.mode, state.temperature]).toEqual([null, 'surprise', null]);
  });
});
