/** One run of Compare: a text, its targets, and what they answer, from one stream of POST /generate_many for each set of
 *  labels, because a task is asked for its own labels. */
import { ApiError, eventError, send, type Body, type Schemas } from '../api/client';
import { serverEvents } from '../api/sse';
import { nameOf } from './targets';
import type { Candidate, Token } from './tokens';

export type State = 'waiting' | 'running' | 'done' | 'failed' | 'stopped' | 'interrupted';
export type ManyBody = Body<'/generate_many'>;

/** Tokens of one piece of an answer: only the last piece changes while it grows. */
const PIECE = 48;

interface ManyEvent {
  /** None in the last word of the server on the whole stream, an error. */
  target?: number;
  event?: 'start' | 'token' | 'choices' | 'error';
  task?: string;
  version?: number;
  token?: Candidate;
  top_tokens?: Candidate[];
  generated_text?: string | null;
  details?: Partial<Schemas['DetailsBody']> | null;
  choices?: Schemas['ChoiceBody'][];
}

/** What one target answers. */
export class Column {
  state = $state<State>('waiting');
  version = $state<number | null>(null);
  pieces = $state.raw<Token[][]>([]);
  choices = $state.raw<Schemas['ChoiceBody'][] | null>(null);
  error = $state.raw<ApiError | null>(null);
  details = $state.raw<Partial<Schemas['DetailsBody']> | null>(null);
  /** Milliseconds from the request to the first token, and to the last one so far. */
  first = $state<number | null>(null);
  requestId = $state<string | null>(null);
  #last = 0;
  count = $state(0);
  /** Tokens before which the answer was branched: these were given, not generated. */
  given = 0;
  #arrived: Token[] = [];
  #ended: State | null = null;

  constructor(
    readonly target: string,
    /** The request that this column is an answer of. */
    readonly asked: ManyBody,
    given: Token[] = [],
    /** The answer that this one branches from. */
    readonly origin: Column | null = null,
  ) {
    this.given = given.length;
    this.#arrived = given;
    this.#flushTokens();
  }

  get tokens(): Token[] {
    return this.pieces.flat();
  }

  get text(): string {
    return this.tokens.map((token) => (token.special ? '' : token.text)).join('');
  }

  get isOver(): boolean {
    return this.state !== 'waiting' && this.state !== 'running';
  }

  /** Tokens a second after the first one; null until that can be known. Measured anew four times a second. */
  rate = $state<number | null>(null);
  #measured = 0;

  #measure(): void {
    const generated = this.count - this.given;
    if (this.first === null || generated < 2) return;
    if (this.#ended === null && this.#last < this.#measured + 250) return;
    this.#measured = this.#last;
    this.rate = (1000 * (generated - 1)) / Math.max(1, this.#last - this.first);
  }

  take(event: ManyEvent, at: number): void {
    if (event.event === 'start') {
      this.version = event.version ?? null;
      return;
    }
    if (event.event === 'error') {
      this.error = eventError(event);
      this.#ended = 'failed';
      return;
    }
    this.first ??= at;
    this.#last = at;
    if (event.event === 'choices') {
      this.choices = event.choices ?? [];
      this.details = event.details ?? null;
      this.#ended = 'done';
      return;
    }
    if (event.token) this.#arrived.push({ ...event.token, top: event.top_tokens ?? [] });
    if (event.generated_text !== null && event.generated_text !== undefined) {
      this.details = event.details ?? null;
      this.#ended = 'done';
    }
  }

  /** Whether something has arrived that is not shown yet. */
  get isBehind(): boolean {
    return this.#arrived.length > 0 || (this.#ended !== null && this.state !== this.#ended);
  }

  /** Show what has arrived; called once a frame at most. */
  flush(): void {
    if (this.#arrived.length) {
      if (this.state === 'waiting') this.state = 'running';
      this.#flushTokens();
      this.#measure();
    }
    if (this.#ended) this.state = this.#ended;
  }

  end(state: State): void {
    this.#ended ??= state;
    this.flush();
    this.#measure();
  }

  #flushTokens(): void {
    if (!this.#arrived.length) return;
    const last = this.pieces.at(-1) ?? [];
    const whole = last.length < PIECE && this.pieces.length ? [...last, ...this.#arrived] : this.#arrived;
    const kept = whole === this.#arrived ? this.pieces : this.pieces.slice(0, -1);
    const added: Token[][] = [];
    for (let at = 0; at < whole.length; at += PIECE) added.push(whole.slice(at, at + PIECE));
    this.count += this.#arrived.length;
    this.#arrived = [];
    this.pieces = [...kept, ...added];
  }
}

/** Milliseconds between two drawings at least: of eight columns each is drawn ten times a second. */
const BETWEEN = 32;

/** Columns that one frame draws at most: to lay all eight out takes longer than a frame may. */
const AT_ONCE = 3;

/** Calls back at a frame that is `BETWEEN` after `before`, or soon where the tab is hidden and there are no frames. */
function soon(before: number, work: () => void): void {
  const left = before + BETWEEN - performance.now();
  if (document.hidden) setTimeout(work, 250);
  else if (left > 8) setTimeout(() => soon(before, work), left);
  else requestAnimationFrame(work);
}

export class Comparison {
  columns = $state.raw<Column[]>([]);
  error = $state.raw<ApiError | null>(null);
  #running = $state.raw<AbortController[]>([]);

  get isRunning(): boolean {
    return this.#running.length > 0;
  }

  /** Send a text to targets, each request to the columns at its `places`; what runs already is stopped. */
  async run(requests: { body: ManyBody; places: number[] }[]): Promise<void> {
    this.stop();
    this.error = null;
    const columns: Column[] = [];
    const streams = requests.map(({ body, places }) => {
      const own = body.targets.map(({ task }) => new Column(task ?? '', body));
      places.forEach((place, at) => (columns[place] = own[at]!));
      return () => this.#stream(body, own);
    });
    this.columns = columns;
    await Promise.all(streams.map((stream) => stream()));
  }

  /** Continue the answer of one column from one of the alternatives to a token. */
  branch(column: Column, index: number, alternative: Candidate): Promise<void> {
    const given = [...column.tokens.slice(0, index), { ...alternative, top: column.tokens[index]?.top ?? [] }];
    const branch = new Column(column.target, column.asked, given, column);
    this.columns = this.columns.map((one) => (one === column ? branch : one));
    const task = column.version === null ? column.target : `${nameOf(column.target)}@${column.version}`;
    const target = task ? { task } : {};
    this.error = null;
    return this.#stream({ ...column.asked, targets: [target], answer_ids: given.map(({ id }) => id) }, [branch]);
  }

  /** Show the answer that a branch left. */
  restore(branch: Column): void {
    this.columns = this.columns.map((one) => (one === branch && branch.origin ? branch.origin : one));
  }

  /** Abort what runs; leaving the page does the same. */
  stop(): void {
    for (const abort of this.#running) abort.abort();
    this.#running = [];
  }

  async #stream(body: ManyBody, columns: Column[]): Promise<void> {
    const abort = new AbortController();
    this.#running = [...this.#running, abort];
    const started = performance.now();
    let state: State = 'interrupted';
    try {
      const response = await send('post', '/generate_many', { json: body, signal: abort.signal });
      for (const column of columns) column.requestId = response.headers.get('x-request-id');
      await read(response, columns, started);
    } catch (error) {
      if (abort.signal.aborted) state = 'stopped';
      else if (error instanceof ApiError) {
        this.error = error;
        state = 'failed';
      }
    }
    for (const column of columns) column.end(state);
    this.#running = this.#running.filter((one) => one !== abort);
  }
}

async function read(response: Response, columns: Column[], started: number): Promise<void> {
  let isWaiting = false;
  let drawn = 0;
  let next = 0;
  const flush = () => {
    drawn = performance.now();
    const inTurn = [...columns.slice(next), ...columns.slice(0, next)].filter((column) => column.isBehind);
    for (const column of inTurn.slice(0, AT_ONCE)) column.flush();
    isWaiting = inTurn.length > AT_ONCE;
    if (!isWaiting) return;
    next = columns.indexOf(inTurn[AT_ONCE]!);
    soon(drawn, flush);
  };
  for await (const { data } of serverEvents(response.body!)) {
    const event = JSON.parse(data) as ManyEvent;
    if (event.target === undefined) throw eventError(event);
    columns[event.target]?.take(event, performance.now() - started);
    if (!isWaiting) {
      isWaiting = true;
      soon(drawn, flush);
    }
  }
}
