/** Reads a JSONL file as the server does, and lists what is wrong with it, by line. The server checks it again. */
export interface Row {
  input: string;
  target: string;
}

export interface RowProblem {
  line: number;
  text: string;
}

export interface RowsReport {
  rows: number;
  /** The first rows. */
  samples: Row[];
  problems: RowProblem[];
  /** All of them: `problems` has only the first. */
  numProblems: number;
  /** How often each target occurs, the most frequent first; null if the targets are texts. */
  labels: [string, number][] | null;
}

const SAMPLES = 4;
const SHOWN_PROBLEMS = 8;
const MOST_LABELS = 100;
const MOST_LINE = 2 ** 20;
/** Targets count as labels if each occurs at least this often on average. */
const REPEATED = 3;
const LONE_SURROGATE = /\p{Surrogate}/u;

/** Reads lines that are fed to it as bytes. */
export class RowsCheck {
  #rest: Uint8Array<ArrayBuffer>[] = [];
  #line = 0;
  #rows = 0;
  #numProblems = 0;
  #samples: Row[] = [];
  #problems: RowProblem[] = [];
  #targets: Map<string, number> | null = new Map();
  readonly #decoder = new TextDecoder('utf-8', { fatal: true });

  constructor(readonly needsTargets: boolean) {}

  feed(bytes: Uint8Array<ArrayBuffer>): void {
    let start = 0;
    for (let end = bytes.indexOf(10); end >= 0; end = bytes.indexOf(10, start)) {
      this.#take([...this.#rest, bytes.subarray(start, end)]);
      this.#rest = [];
      start = end + 1;
    }
    if (start < bytes.length) this.#rest.push(bytes.subarray(start));
  }

  end(): RowsReport {
    if (this.#rest.length) this.#take(this.#rest);
    const labels = [...(this.#targets ?? [])].sort(([, a], [, b]) => b - a);
    const isLabels = labels.length > 0 && labels.length <= Math.max(1, this.#rows / REPEATED);
    return {
      rows: this.#rows,
      samples: this.#samples,
      problems: this.#problems,
      numProblems: this.#numProblems,
      labels: this.needsTargets && isLabels ? labels : null,
    };
  }

  #take(pieces: Uint8Array<ArrayBuffer>[]): void {
    this.#line += 1;
    const length = pieces.reduce((sum, piece) => sum + piece.length, 0);
    if (length > MOST_LINE) return this.#complain('longer than a mebibyte; write one row on each line');
    const bytes = pieces.length === 1 ? pieces[0]! : joined(pieces, length);
    let text: string;
    try {
      text = this.#decoder.decode(bytes);
    } catch {
      return this.#complain('not UTF-8');
    }
    if (!text.trim()) return;
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (error) {
      return this.#complain(`not JSON: ${error instanceof Error ? error.message : error}`);
    }
    const problem = this.#problem(value);
    if (problem) return this.#complain(problem);
    const { input, target = '' } = value as Partial<Row>;
    this.#rows += 1;
    if (this.#samples.length < SAMPLES) this.#samples.push({ input: input!, target });
    if (!this.#targets) return;
    this.#targets.set(target, (this.#targets.get(target) ?? 0) + 1);
    if (this.#targets.size > MOST_LABELS) this.#targets = null;
  }

  #problem(value: unknown): string {
    const fields = (typeof value === 'object' && !Array.isArray(value) ? value : null) as Record<
      string,
      unknown
    > | null;
    for (const name of this.needsTargets ? ['input', 'target'] : ['input']) {
      const text = fields?.[name];
      if (typeof text !== 'string') return `no text in “${name}”`;
      if (!text.trim()) return `“${name}” is empty`;
      if (LONE_SURROGATE.test(text)) return `“${name}” has half of a surrogate pair`;
    }
    return '';
  }

  #complain(text: string): void {
    this.#numProblems += 1;
    if (this.#problems.length < SHOWN_PROBLEMS) this.#problems.push({ line: this.#line, text });
  }
}

function joined(pieces: Uint8Array<ArrayBuffer>[], length: number): Uint8Array<ArrayBuffer> {
  const whole = new Uint8Array(length);
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

/** Checks a file piece by piece, so that the page stays responsive. */
export async function checkRows(file: Blob, needsTargets = true): Promise<RowsReport> {
  const check = new RowsCheck(needsTargets);
  const reader = file.stream().getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return check.end();
    check.feed(value);
  }
}
