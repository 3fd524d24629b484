import { describe, expect, it } from 'vitest';
import { RowsCheck, type RowsReport } from './rows';

function checked(text: string | Uint8Array<ArrayBuffer>, needsTargets = true, size = 7): RowsReport {
  const bytes = typeof text === 'string' ? new TextEncoder().encode(text) : text;
  const check = new RowsCheck(needsTargets);
  for (let at = 0; at < bytes.length; at += size) check.feed(bytes.slice(at, at + size));
  return check.end();
}
const row = (input: unknown, target: unknown) => JSON.stringify({ input, target });

describe('the rows of a file', () => {
  it('are counted wherever the file is cut, without empty lines', () => {
    const text = `\ufeff${row('a 🙂', 'x')}\r\n\n${row('b', 'y')}`;
    expect(checked(text, true, 1)).toMatchObject({ rows: 2, numProblems: 0, labels: null });
    expect(checked(text).samples).toEqual([
      { input: 'a 🙂', target: 'x' },
      { input: 'b', target: 'y' },
    ]);
  });
  it('have labels where targets are repeated', () => {
    const text = ['ham', 'spam', 'ham', 'ham', 'ham', 'spam'].map((label, at) => row(`text ${at}`, label)).join('\n');
    expect(checked(text).labels).toEqual([
      ['ham', 4],
      ['spam', 2],
    ]);
    expect(checked(text, false).labels).toBe(null);
  });
  it('are named by line where they are wrong', () => {
    const text = [row('a', 'x'), '{"input": "b"', row('c', ''), row(1, 'x'), '[]', 'null', row('d', '\ud800')];
    const { rows, problems, numProblems } = checked(text.join('\n'));
    expect([rows, numProblems]).toEqual([1, 6]);
    expect(problems.map(({ line }) => line)).toEqual([2, 3, 4, 5, 6, 7]);
    expect(problems[0]!.text).toMatch(/^not JSON/);
    expect(problems[1]!.text).toBe('“target” is empty');
  });
  it('need no targets for a teacher', () => {
    expect(checked('{"input": "a"}', false)).toMatchObject({ rows: 1, numProblems: 0 });
  });
  it('are UTF-8, and at most a mebibyte long', () => {
    const bad = new Uint8Array([...new TextEncoder().encode('{"input": "'), 0xff, 10]);
    expect(checked(bad).problems).toEqual([{ line: 1, text: 'not UTF-8' }]);
    expect(checked(`"${'x'.repeat(2 ** 20)}"`, true, 2 ** 18).numProblems).toBe(1);
  });
  it('list the first problems and count all', () => {
    expect(checked('x\n'.repeat(50))).toMatchObject({ rows: 0, numProblems: 50, problems: { length: 8 } });
  });
});
