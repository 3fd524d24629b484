/** One training job while it is watched: its state, and the curve of its losses. */
import { eventError, type Schemas } from '../api/client';
import type { JobEvent } from './job_events';
import { tasks } from './tasks.svelte';
import { WatchedJob } from './watched_job.svelte';

export type Job = Schemas['JobBody'];
export type Measurement = Schemas['Measurement'];

export interface Point {
  step: number;
  loss: number | null;
  speed: number | null;
}

export class Training extends WatchedJob<Job> {
  points = $state.raw<Point[]>([]);
  measured = $state.raw<Measurement[]>([]);
  /** Learning rates that were tried, and the loss after a few steps of each. */
  tried = $state.raw<{ learning_rate: number; loss: number | null }[]>([]);
  #arrived: JobEvent[] = [];
  #isWaiting = false;

  constructor(id: string) {
    super('/training/jobs', id);
  }

  override watch(): Promise<void> {
    this.points = this.measured = this.tried = [];
    return super.watch();
  }

  protected override get keepsRecord(): boolean {
    return true;
  }

  /** Collect an event; all that arrive within a frame are shown at once. */
  protected override take(event: JobEvent): void {
    this.#arrived.push(event);
    if (this.#isWaiting) return;
    this.#isWaiting = true;
    if (document.hidden) setTimeout(() => this.#flush(), 250);
    else requestAnimationFrame(() => this.#flush());
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
      } else if (event.error) this.error = eventError(event);
    }
    if (this.#arrived.some(({ event }) => event === 'end')) void tasks.load(true);
    this.#arrived = [];
    [this.points, this.measured, this.job] = [points, measured, job];
  }
}
