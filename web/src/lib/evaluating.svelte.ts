/** One evaluation while it is watched: its state, its progress and its result. */
import { api, ApiError, send, type Schemas } from '../api/client';
import type { Result } from './evaluation';
import { followJob } from './job_events';

export type Evaluation = Schemas['EvaluationBody'];

export class Evaluating {
  job = $state.raw<Evaluation | null>(null);
  /** The result as Markdown, once it is asked for. */
  card = $state<string | null>(null);
  error = $state.raw<ApiError | null>(null);
  isBusy = $state(false);

  constructor(readonly id: string) {}

  get result(): Result | null {
    return (this.job?.result ?? null) as unknown as Result | null;
  }

  /** Load the evaluation and follow it until its end, or until `signal` aborts. */
  async watch(signal: AbortSignal): Promise<void> {
    this.error = null;
    try {
      this.job = (await api.get('/evaluations/{job}', { path: { job: this.id }, signal })).body;
      await followJob(
        '/evaluations',
        this.id,
        ({ event, state, done, total, job, ...rest }) => {
          if (signal.aborted || !this.job) return;
          if (event === 'state' && state) this.job = { ...this.job, state };
          else if (event === 'progress') this.job = { ...this.job, progress: { done: done ?? 0, total: total ?? 0 } };
          else if (event === 'end') this.job = job as Evaluation;
          else if (rest.error) {
            this.error = new ApiError(String(rest.error), 0, String(rest.code ?? ''), String(rest.remedy ?? ''));
          }
        },
        signal,
      );
    } catch (error) {
      if (!signal.aborted) this.#report(error);
    }
  }

  async cancel(): Promise<void> {
    await this.#do(async () => {
      this.job = (await api.post('/evaluations/{job}/cancel', { path: { job: this.id } })).body;
    });
  }

  /** Delete the evaluation; whether that was done. */
  async remove(): Promise<boolean> {
    await this.#do(() => api.delete('/evaluations/{job}', { path: { job: this.id } }));
    return this.error === null;
  }

  async loadCard(): Promise<void> {
    await this.#do(async () => {
      this.card = await (await send('get', '/evaluations/{job}/card', { path: { job: this.id } })).text();
    });
  }

  async #do(work: () => Promise<unknown>): Promise<void> {
    if (this.isBusy) return;
    this.isBusy = true;
    this.error = null;
    try {
      await work();
    } catch (error) {
      this.#report(error);
    } finally {
      this.isBusy = false;
    }
  }

  #report(error: unknown): void {
    if (!(error instanceof ApiError)) throw error;
    this.error = error;
  }
}
