/** Reads /metrics every other second while the page is visible, and keeps the last five minutes. */
import { ApiError, send } from '../api/client';
import { figuresOf, readingOf, type Figures, type Reading } from './serving';

const EVERY = 2_000;
const AFTER_AN_ERROR = 10_000;
const MOST = 150;
/** Seconds that rates and latencies are taken over. */
export const WINDOW = 30;

export class Poller {
  figures = $state.raw<Figures[]>([]);
  error = $state.raw<ApiError | null>(null);
  #readings: { at: number; reading: Reading }[] = [];
  #timer: ReturnType<typeof setTimeout> | undefined;
  #reading: AbortController | null = null;
  readonly #began = performance.now();
  readonly #look = () => (document.hidden ? this.#pause() : void this.read());

  get now(): Figures | null {
    return this.figures.at(-1) ?? null;
  }

  start(): void {
    document.addEventListener('visibilitychange', this.#look);
    this.#look();
  }

  stop(): void {
    document.removeEventListener('visibilitychange', this.#look);
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
    this.#timer = setTimeout(() => void this.read(), this.error ? AFTER_AN_ERROR : EVERY);
  }

  #take(reading: Reading): void {
    const at = (performance.now() - this.#began) / 1000;
    this.#readings = [...this.#readings.filter((one) => one.at >= at - WINDOW), { at, reading }];
    const first = this.#readings[0]!;
    const next = figuresOf(first.reading, reading, at - first.at, at);
    this.figures = [...this.figures.slice(1 - MOST), next];
  }
}
