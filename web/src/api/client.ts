/** Requests to our own server: typed by the OpenAPI document, with errors as the server wrote them. */
import { session } from '../lib/session.svelte';
import type { components, paths } from './schema';

export type Schemas = components['schemas'];

type Method = 'get' | 'put' | 'post' | 'delete';
type PathsWith<M extends Method> = {
  [P in keyof paths]: paths[P][M] extends { responses: unknown } ? P : never;
}[keyof paths];
type Operation<P extends keyof paths, M extends Method> = paths[P][M];
type Json<R> = R extends { content: { 'application/json': infer T } } ? T : undefined;
type Reply<O> = O extends { responses: infer R }
  ? R extends { 200: infer A }
    ? Json<A>
    : R extends { 201: infer B }
      ? Json<B>
      : R extends { 202: infer C }
        ? Json<C>
        : undefined
  : never;
type PathParameters<O> = O extends { parameters: { path: infer T } } ? T : undefined;
type QueryParameters<O> = O extends { parameters: { query?: infer T } } ? T : undefined;

export type Body<P extends PathsWith<'post'>> =
  Operation<P, 'post'> extends { requestBody: { content: { 'application/json': infer T } } } ? T : never;

/** What a request carries besides its path. */
export interface Options {
  path?: Record<string, string | number>;
  query?: Record<string, string | number | boolean | null | undefined>;
  json?: unknown;
  form?: FormData;
  ifMatch?: string;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

type Typed<O> = Omit<Options, 'path' | 'query'> &
  (PathParameters<O> extends object ? { path: PathParameters<O> } : { path?: undefined }) & {
    query?: QueryParameters<O>;
  };

/** An error reply, or a connection that failed (status 0). */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string,
    readonly remedy: string,
    readonly requestId: string | null = null,
    readonly retryAfter: number | null = null,
  ) {
    super(message);
  }
}

/** A reply and the headers that a change needs. */
export interface Answer<T> {
  body: T;
  etag: string | null;
}

const NO_CONNECTION = 'Check that the server runs, and send the request again.';

function address(path: string, options: Options): string {
  const filled = path.replace(/\{(\w+)\}/g, (_, name: string) => encodeURIComponent(String(options.path?.[name])));
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(options.query ?? {})) {
    if (value !== undefined && value !== null) query.set(name, String(value));
  }
  // Relative to the page, so that a proxy may put the server below a path.
  return `.${filled}${query.size ? `?${query}` : ''}`;
}

async function errorOf(response: Response): Promise<ApiError> {
  const id = response.headers.get('x-request-id');
  const after = Number(response.headers.get('retry-after')) || null;
  try {
    const body = await response.json();
    const found = body.error?.message ? { ...body.error, error: body.error.message } : body;
    return new ApiError(
      String(found.error),
      response.status,
      String(found.code ?? ''),
      String(found.remedy ?? ''),
      id,
      after,
    );
  } catch {
    return new ApiError(
      `The server answered with status ${response.status}.`,
      response.status,
      '',
      NO_CONNECTION,
      id,
      after,
    );
  }
}

/** Send a request and return its reply, whose body nobody has read. A request is never sent twice. */
export async function send(method: string, path: string, options: Options = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  if (session.key) headers.set('Authorization', `Bearer ${session.key}`);
  if (options.ifMatch) headers.set('If-Match', options.ifMatch);
  if (options.json !== undefined) headers.set('Content-Type', 'application/json');
  let response: Response;
  try {
    response = await fetch(address(path, options), {
      method: method.toUpperCase(),
      headers,
      body: options.json === undefined ? (options.form ?? null) : JSON.stringify(options.json),
      signal: options.signal ?? null,
      credentials: 'omit',
      cache: 'no-store',
    });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError('The server cannot be reached.', 0, 'unreachable', NO_CONNECTION);
  }
  if (response.ok) return response;
  const error = await errorOf(response);
  if (error.status === 401) session.needsKey = true;
  throw error;
}

async function call<T>(method: Method, path: string, options: Options): Promise<Answer<T>> {
  const response = await send(method, path, options);
  const text = await response.text();
  return { body: (text ? JSON.parse(text) : undefined) as T, etag: response.headers.get('etag') };
}

export const api = {
  get: <P extends PathsWith<'get'>>(path: P, options: Typed<Operation<P, 'get'>>) =>
    call<Reply<Operation<P, 'get'>>>('get', path as string, options as Options),
  post: <P extends PathsWith<'post'>>(path: P, options: Typed<Operation<P, 'post'>>) =>
    call<Reply<Operation<P, 'post'>>>('post', path as string, options as Options),
  put: <P extends PathsWith<'put'>>(path: P, options: Typed<Operation<P, 'put'>>) =>
    call<Reply<Operation<P, 'put'>>>('put', path as string, options as Options),
  delete: <P extends PathsWith<'delete'>>(path: P, options: Typed<Operation<P, 'delete'>>) =>
    call<Reply<Operation<P, 'delete'>>>('delete', path as string, options as Options),
};
