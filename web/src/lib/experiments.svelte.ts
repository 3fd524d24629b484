/** Experiments with one task: past ones, the one that is open, its progress and its result. */
import { api, ApiError, send, type Schemas } from '../api/client';
import { followJob, isOver } from './job_events';

export type Experiment = Schemas['ExperimentBody'];

export class Experiments {
  all = $state.raw<Experiment[]>([]);
  /** The open one, with its result once it is done. */
  open = $state.raw<Experiment | null>(null);
  error = $state.raw<ApiError | null>(null);
  isStarting = $state(false);
  #watching = new AbortController();

  constructor(readonly task: string) {}

  get isRunning(): boolean {
    return this.open !== null && !isOver(this.open.state);
  }

  /** Load past experiments and open the newest that is done or still runs. */
  async load(version: number | null): Promise<void> {
    try {
      const { body } = await api.get('/interpretations', {});
      this.all = body.interpretations.filter(({ task }) => task === this.task);
      const fitting = this.all.filter((one) => version === null || one.version === version);
      const found = fitting.find(({ state }) => state === 'done' || !isOver(state));
      if (found) await this.show(found.id);
    } catch (error) {
      this.#report(error);
    }
  }

  /** Open one: its result, or its progress until its end. */
  async show(id: string): Promise<void> {
    this.leave();
    const watching = this.#watching;
    try {
      const { body } = await api.get('/interpretations/{job}', { path: { job: id } });
      if (watching.signal.aborted) return;
      this.#take(body);
      if (!isOver(body.state)) await this.#follow(id, watching.signal);
    } catch (error) {
      if (!watching.signal.aborted) this.#report(error);
    }
  }

  async start(form: FormData): Promise<void> {
    if (this.isStarting) return;
    this.isStarting = true;
    this.error = null;
    try {
      const reply = await send('post', '/prompts/{task}/interpretation', { path: { task: this.task }, form });
      const job = (await reply.json()) as Experiment;
      this.#take(job);
      void this.show(job.id);
    } catch (error) {
      this.#report(error);
    } finally {
      this.isStarting = false;
    }
  }

  async cancel(): Promise<void> {
    if (!this.open) return;
    try {
      const { body } = await api.post('/interpretations/{job}/cancel', { path: { job: this.open.id } });
      this.#take(body);
    } catch (error) {
      this.#report(error);
    }
  }

  /** Stop watching; the job itself continues. */
  leave(): void {
    this.#watching.abort();
    this.#watching = new AbortController();
  }

  async #follow(id: string, signal: AbortSignal): Promise<void> {
    await followJob(
      '/interpretations',
      id,
      ({ event, state, done, total, job }) => {
        if (signal.aborted || !this.open) return;
        if (event === 'state' && state) this.#take({ ...this.open, state });
        if (event === 'progress') this.#take({ ...this.open, progress: { done: done ?? 0, total: total ?? 0 } });
        if (event === 'end') this.#take(job as Experiment);
      },
      signal,
    );
  }

  #take(job: Experiment): void {
    this.open = job;
    const isKnown = this.all.some(({ id }) => id === job.id);
    this.all = isKnown ? this.all.map((one) => (one.id === job.id ? job : one)) : [job, ...this.all];
  }

  #report(error: unknown): void {
    this.error =
      error instanceof ApiError
        ? error
        : new ApiError('The connection ended before the experiments did.', 0, 'interrupted', 'Open them again below.');
  }
}
