/** The views, in the order of the navigation; each is loaded when it is opened first. */
import type { Component } from 'svelte';

export interface View {
  path: string;
  title: string;
  load: () => Promise<{ default: Component }>;
}

export const VIEWS: View[] = [
  { path: 'compare', title: 'Compare', load: () => import('./Compare.svelte') },
  { path: 'tasks', title: 'Tasks', load: () => import('./Tasks.svelte') },
  { path: 'upload', title: 'Upload', load: () => import('./Upload.svelte') },
  { path: 'train', title: 'Train', load: () => import('./Train.svelte') },
  { path: 'evaluate', title: 'Evaluate', load: () => import('./Evaluate.svelte') },
  { path: 'server', title: 'Server', load: () => import('./Server.svelte') },
];
