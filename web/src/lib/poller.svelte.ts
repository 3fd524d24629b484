/**
 * Reads /metrics while the page is visible, and keeps the last five minutes. A page that nobody touches costs the server
 * nearly nothing: after a minute without input it reads four times a minute, and at once when somebody comes back.
 */
import { ApiError, send } from '../api/client';
import { figuresOf, readingOf, type Figures, type Reading } from './serving';

const EVERY = 5_000;
const EVERY_WHILE_IDLE = 15_000;
const IDLE_AFTER = 60_000;
const INPUTS = ['pointermove', 'pointerdown', 'keydown', 'wheel', 'focusin'] as const;
const AFTER_AN_ERROR = 10_000;
/** Seconds that are kept. */
const KEPT = 300;
/** Seconds that rates and latencies are taken over. */
export const WINDOW = 30;

export class Poller {
  figures = $state.raw<Figures[]>([]);
  error = $state.raw<ApiError | null>(null);
  #readings: { at: number; reading: Reading }[] = [];
  #timer: ReturnType<typeof setTimeout> | undefined;
  #reading: AbortController | null = null;
  readonly #began = performance.now();
  #touched = performance.now();
  readonly #touch = () => {
    const wasIdle = this.#isIdle;
    this.#touched = performance.now();
    if (wasIdle) this.#look();
  };
  readonly #look = () => (document.hidden ? this.#pause() : void this.read());

  get now(): Figures | null {
    return this.figures.at(-1) ?? null;
  }

  get #isIdle(): boolean {
    return performance.now() - this.#touched > IDLE_AFTER;
  }

  start(): void {
    document.addEventListener('visibilitychange', this.#look);
    for (const input of INPUTS) document.addEventListener(input, this.#touch, { passive: true });
    this.#look();
  }

  stop(): void {
    document.removeEventListener('visibilitychange', this.#look);
    for (const input of INPUTS) document.removeEventListener(input, this.#touch);
    this.#pause();
  }

  #pause(): void {
    clearTimeout(this.#timer);
    this.#reading?.abort();
    this.#reading = null;
  }

  /** Read once, and again after a while unless the page is hidden by then. */
  async read(): Promise<void> {
    this.#pause();
    const reading = (this.#reading = new AbortController());
    try {
      const response = await send('get', '/metrics', { signal: reading.signal });
      this.#take(readingOf(await response.text()));
      this.error = null;
    } catch (error) {
      if (reading.signal.aborted) return;
      this.error =
        error instanceof ApiError
          ? error
          : new ApiError('The connection ended before the figures did.', 0, 'interrupted', 'They are read again soon.');
    }
    if (reading.signal.aborted) return;
    const pause = this.#isIdle ? EVERY_WHILE_IDLE : this.error ? AFTER_AN_ERROR : EVERY;
    this.#timer = setTimeout(() => void this.read(), pause);
  }

  #take(reading: Reading): void {
    const at = (performance.now() - this.#began) / 1000;
    this.#readings = [...this.#readings.filter((one) => one.at >= at - WINDOW), { at, reading }];
    const first = this.#readings[0]!;
    const next = figuresOf(first.reading, reading, at - first.at, at);
    this.figures = [...this.figures.filter((one) => one.at >= at - KEPT), next];
  }
}
