/** The arithmetic of tokens: surprise, and where two answers differ. */
export interface Candidate {
  id: number;
  text: string;
  logprob: number | null;
  special: boolean;
}

export interface Token extends Candidate {
  top: Candidate[];
}

export const probability = (token: Candidate): number => Math.exp(token.logprob ?? 0);

/** Surprisal in bits: how unexpected the token was. */
export function surprisal(token: Candidate): number {
  return token.logprob === null ? 0 : -token.logprob / Math.LN2;
}

const STEPS = [0.5, 1, 2, 3.5, 5.5];

/** The shade of a token, from 0 (expected) to 5 (a surprise of more than 5.5 bits, one in 45). */
export function shade(token: Candidate): number {
  const bits = surprisal(token);
  return STEPS.filter((step) => bits >= step).length;
}

/**
 * Which tokens of `b` are no part of a longest common subsequence with `a`. Common beginnings and ends are cheap; in
 * between the work is the product of both lengths, so beyond `most` cells all of it counts as different.
 */
export function differing(a: number[], b: number[], most = 4_000_000): Set<number> {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const left = a.slice(start, a.length - end);
  const right = b.slice(start, b.length - end);
  const found = new Set(right.map((_, index) => start + index));
  if (left.length * right.length > most) return found;
  const width = right.length + 1;
  const table = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      table[i * width + j] =
        left[i] === right[j]
          ? table[(i + 1) * width + j + 1]! + 1
          : Math.max(table[(i + 1) * width + j]!, table[i * width + j + 1]!);
    }
  }
  for (let i = 0, j = 0; i < left.length && j < right.length;) {
    if (left[i] === right[j]) {
      found.delete(start + j);
      i += 1;
      j += 1;
    } else if (table[(i + 1) * width + j]! >= table[i * width + j + 1]!) i += 1;
    else j += 1;
  }
  return found;
}
