/** Work that a person waits for: one at a time; its error is shown, and leaving the view aborts it. */
import { ApiError } from '../api/client';

export class Work {
  error = $state.raw<ApiError | null>(null);
  isBusy = $state(false);
  readonly #leaving = new AbortController();

  /** What `work` returns; null if it failed, was aborted, or other work is not done yet. */
  async do<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T | null> {
    if (this.isBusy) return null;
    this.isBusy = true;
    this.error = null;
    try {
      return await work(this.#leaving.signal);
    } catch (error) {
      if (!this.#leaving.signal.aborted) this.report(error);
      return null;
    } finally {
      this.isBusy = false;
    }
  }

  leave(): void {
    this.#leaving.abort();
  }

  protected report(error: unknown): void {
    if (!(error instanceof ApiError)) throw error;
    this.error = error;
  }
}
