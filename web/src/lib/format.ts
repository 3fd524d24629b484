/** Numbers as people read them. Intl does the rest. */
const whole = new Intl.NumberFormat('en');
const THIN = '\u202f';

/** The level of every interval of the server. */
export const LEVEL = `95${THIN}%`;

export const count = (value: number): string => whole.format(value);

export function percent(share: number, digits = 1): string {
  return `${(100 * share).toFixed(digits)}${THIN}%`;
}

export function seconds(value: number): string {
  if (value < 1) return `${Math.round(1000 * value)}${THIN}ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)}${THIN}s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes}${THIN}min ${Math.round(value % 60)}${THIN}s`;
  return `${Math.floor(minutes / 60)}${THIN}h ${minutes % 60}${THIN}min`;
}

export function bytes(value: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let index = 0;
  while (value >= 1024 && index < units.length - 1) {
    value /= 1024;
    index += 1;
  }
  return `${index && value < 100 ? value.toFixed(1) : Math.round(value)}${THIN}${units[index]}`;
}

const moment = new Intl.DateTimeFormat('en', { dateStyle: 'medium', timeStyle: 'short' });

export function time(iso: string): string {
  const found = new Date(iso);
  return Number.isNaN(found.getTime()) ? iso : moment.format(found);
}

/** Whether nothing of a text can be seen: spaces, line ends, and characters that only control others. */
export const isBlank = (text: string): boolean => /^[\s\p{C}\p{M}]*$/u.test(text);

/** A token's text where it stands alone: what has no ink, or would change the direction of writing, can be seen. */
export function visible(text: string): string {
  const marked = text.replace(/ /g, '·').replace(/\n/g, '↵').replace(/\t/g, '⇥');
  return marked.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (one) => `U+${hex(one)}`) || '∅';
}

const hex = (one: string): string => one.codePointAt(0)!.toString(16).toUpperCase().padStart(4, '0');
