/** One training job while it is watched: its state, and the curve of its losses. */
import { api, ApiError, type Schemas } from '../api/client';
import { followJob, type JobEvent } from './job_events';
import { tasks } from './tasks.svelte';

export type Job = Schemas['JobBody'];
export type Measurement = Schemas['Measurement'];

export interface Point {
  step: number;
  loss: number | null;
  speed: number | null;
}

export class Training {
  job = $state.raw<Job | null>(null);
  points = $state.raw<Point[]>([]);
  measured = $state.raw<Measurement[]>([]);
  /** Learning rates that were tried, and the loss after a few steps of each. */
  tried = $state.raw<{ learning_rate: number; loss: number | null }[]>([]);
  error = $state.raw<ApiError | null>(null);
  isBusy = $state(false);
  #arrived: JobEvent[] = [];
  #isWaiting = false;

  constructor(readonly id: string) {}

  /** Load the job and follow it until its end, or until `signal` aborts. */
  async watch(signal: AbortSignal): Promise<void> {
    this.error = null;
    this.points = this.measured = this.tried = [];
    try {
      this.job = (await api.get('/training/jobs/{job}', { path: { job: this.id }, signal })).body;
      await followJob('/training/jobs', this.id, (event) => this.take(event), signal);
    } catch (error) {
      if (!signal.aborted) this.#report(error);
    }
  }

  /** Collect an event; all that arrive within a frame are shown at once. */
  take(event: JobEvent): void {
    this.#arrived.push(event);
    if (this.#isWaiting) return;
    this.#isWaiting = true;
    if (document.hidden) setTimeout(() => this.#flush(), 250);
    else requestAnimationFrame(() => this.#flush());
  }

  async cancel(): Promise<void> {
    await this.#do(async () => {
      this.job = (await api.post('/training/jobs/{job}/cancel', { path: { job: this.id } })).body;
    });
  }

  /** Delete the job; whether that was done. */
  async remove(): Promise<boolean> {
    await this.#do(() => api.delete('/training/jobs/{job}', { path: { job: this.id } }));
    return this.error === null;
  }

  #flush(): void {
    this.#isWaiting = false;
    const points = [...this.points];
    const measured = [...this.measured];
    let job = this.job!;
    for (const event of this.#arrived) {
      if (event.event === 'state') job = { ...job, state: event.state as Job['state'] };
      else if (event.event === 'phase') job = { ...job, phase: String(event.phase) };
      else if (event.event === 'tried') this.tried = [...this.tried, event as unknown as (typeof this.tried)[number]];
      else if (event.event === 'end') job = event.job as Job;
      else if (event.event === 'step') {
        const { step, loss, tokens_per_second, seconds_left, validation } = event as unknown as Job & { loss: number };
        points.push({ step, loss, speed: tokens_per_second ?? null });
        job = { ...job, step, loss, tokens_per_second, seconds_left, validation } as Job;
        if (validation && validation.step !== measured.at(-1)?.step) measured.push(validation);
      } else if (event.error) {
        this.error = new ApiError(String(event.error), 0, String(event.code ?? ''), String(event.remedy ?? ''));
      }
    }
    if (this.#arrived.some(({ event }) => event === 'end')) void tasks.load(true);
    this.#arrived = [];
    [this.points, this.measured, this.job] = [points, measured, job];
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
