/** A job while it is watched: its state, its progress, its end, and what went wrong with it or with watching it. */
import { call, eventError, send, type Schemas } from '../api/client';
import { followJob, isOver, type JobEvent, type JobKind } from './job_events';
import { Work } from './work.svelte';

/** What jobs of all kinds have. */
export interface AnyJob {
  state: string;
  created_at: string;
  by?: string | null;
  error?: { error: string; remedy?: string } | null;
  progress?: Schemas['Progress'];
}

export class WatchedJob<J extends AnyJob> extends Work {
  job = $state.raw<J | null>(null);
  #watching = new AbortController();

  constructor(
    readonly kind: JobKind,
    readonly id: string,
  ) {
    super();
  }

  get isOver(): boolean {
    return this.job !== null && isOver(this.job.state);
  }

  /** Load the job and follow it until its end, or until `leave`; anew if it is watched already. */
  async watch(): Promise<void> {
    this.#watching.abort();
    const { signal } = (this.#watching = new AbortController());
    this.error = null;
    try {
      this.job = (await call<J>('get', `${this.kind}/{job}`, { path: { job: this.id }, signal })).body;
      if (!this.keepsRecord && this.isOver) return;
      await followJob(this.kind, this.id, (event) => signal.aborted || this.take(event), signal);
    } catch (error) {
      if (!signal.aborted) this.report(error);
    }
  }

  /** Whether the events of a job that is over say more than the job itself. */
  protected get keepsRecord(): boolean {
    return false;
  }

  protected take(event: JobEvent): void {
    const { state, done, total } = event;
    if (!this.job) return;
    if (event.event === 'end') this.job = event.job as J;
    else if (event.event === 'state' && state) this.job = { ...this.job, state };
    else if (event.event === 'progress') this.job = { ...this.job, progress: { done: done ?? 0, total: total ?? 0 } };
    else if (event.error) this.error = eventError(event);
  }

  async cancel(): Promise<void> {
    await this.do(async () => {
      this.job = (await call<J>('post', `${this.kind}/{job}/cancel`, { path: { job: this.id } })).body;
    });
  }

  /** Delete the job; whether that was done. */
  async remove(): Promise<boolean> {
    await this.do(() => send('delete', `${this.kind}/{job}`, { path: { job: this.id } }));
    return this.error === null;
  }

  override leave(): void {
    this.#watching.abort();
    super.leave();
  }
}
