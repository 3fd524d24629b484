import { describe, expect, it } from 'vitest';
import { queryOf, requestsOf, stateOf } from './compare_state';

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

describe('the requests of a comparison', () => {
  const asked = (query: string, labelsOf: Record<string, string[]>) =>
    requestsOf(stateOf(new URLSearchParams(query)), labelsOf).map(({ body, places }) => [
      body.parameters?.choices ?? null,
      places,
    ]);
  const labelsOf = { mood: ['good', 'bad'], spam: ['ham', 'spam'], story: [] };

  it('scores each task by its own labels, and the frozen model by those of the first task', () => {
    expect(asked('with=mood&with=&with=spam&with=mood@2&with=story', labelsOf)).toEqual([
      [
        ['good', 'bad'],
        [0, 1, 3],
      ],
      [['ham', 'spam'], [2]],
      [null, [4]],
    ]);
  });
  it('is one request where nothing is scored', () => {
    expect(asked('labels=0&with=mood&with=&with=spam', labelsOf)).toEqual([[null, [0, 1, 2]]]);
  });
});
