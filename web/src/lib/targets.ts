/** What answers, as requests name it: a task, task@version, or '' for the frozen model. */

/** The name of a target: the text before @. */
export const nameOf = (target: string): string => target.split('@')[0] ?? '';
export const versionOf = (target: string): number | null => Number(target.split('@')[1]) || null;
