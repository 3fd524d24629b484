import { expect, it } from 'vitest';
import { isBlank, visible } from './format';
import { typeset } from './interpretation';

it('shows what has no ink, or turns the direction of writing', () => {
  expect(visible(' a\n')).toBe('·a↵');
  expect(visible('')).toBe('∅');
  expect(visible('\u202eabc\u200b')).toBe('U+202EabcU+200B');
  expect(visible('\ud83d')).toBe('U+D83D');
});

it('knows a text that cannot be seen', () => {
  for (const text of ['', ' \n', '\u200b\u200d', '\u0000', '\ufeff']) expect(isBlank(text)).toBe(true);
  for (const text of ['a', ' .', '😀']) expect(isBlank(text)).toBe(false);
});

it('sets minus signs and keeps an equation on one line', () => {
  expect(typeset('keep -17% (-43% to 0%), p = 0.2; zero-shot')).toBe(
    'keep −17% (−43% to 0%), p\u00a0=\u00a00.2; zero-shot',
  );
});
