// Formats times, numbers, and text from outside.

/**
 * "850 µs", "14.2 ms", "1.52 s", "3 min 20 s", "2 h 5 min", "4 d 3 h".
 * @param {number} ms
 */
export function duration(ms) {
  if (!Number.isFinite(ms)) return "–";
  if (ms < 0) return `−${duration(-ms)}`;
  if (ms === 0) return "0 ms";
  if (ms < 1) return `${Math.round(ms * 1000)} µs`;
  if (ms < 999.5) return `${digits(ms)} ms`;
  if (ms < 59_950) return `${digits(ms / 1000)} s`;
  return long(ms / 1000);
}

/**
 * As above, for configured durations: "3 s", not "3.00 s".
 * @param {number} ms
 */
export function setting(ms) {
  return duration(ms).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
}

/**
 * As above, without fractions, for running counters: "14 s", "3 min 20 s".
 * @param {number} ms
 */
export function whole(ms) {
  if (!Number.isFinite(ms)) return "–";
  const seconds = Math.max(0, Math.round(ms / 1000));
  return seconds < 60 ? `${seconds} s` : long(seconds);
}

/** @param {number} seconds */
function long(seconds) {
  seconds = Math.round(seconds);
  const [d, h, m, s] = [seconds / 86_400, (seconds / 3600) % 24, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  if (d) return h ? `${d} d ${h} h` : `${d} d`;
  if (h) return m ? `${h} h ${m} min` : `${h} h`;
  return s ? `${m} min ${s} s` : `${m} min`;
}

/** @param {number} number */
function digits(number) {
  return number.toFixed(number < 9.995 ? 2 : number < 99.95 ? 1 : 0);
}

/**
 * A proto duration, "4.500s", in milliseconds.
 * @param {string | undefined} text
 */
export function milliseconds(text) {
  return text ? Number.parseFloat(text) * 1000 : NaN;
}

/**
 * A proto timestamp in milliseconds since 1970; `NaN` if it is not set.
 * @param {string | undefined} text
 */
export function instant(text) {
  if (!text) return NaN;
  // `Date` has a resolution of 1 ms, and parts of a cycle are often shorter.
  const below = /\.\d{3}(\d+)/.exec(text)?.[1] ?? "";
  return Date.parse(text) + Number(`0.${below}0`);
}

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const DAY = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", day: "numeric" });

/**
 * The time of day, and the date if it is not today.
 * @param {string | undefined} text
 */
export function time(text) {
  const at = instant(text);
  if (Number.isNaN(at)) return "–";
  const today = new Date().toDateString() === new Date(at).toDateString();
  return today ? CLOCK.format(at) : `${DAY.format(at)}, ${CLOCK.format(at)}`;
}

/**
 * A whole number with thousands separators.
 * @param {number | string | undefined} number
 */
export function count(number) {
  return Number(number ?? 0).toLocaleString("en-US");
}

/**
 * "1 cycle", "2 cycles".
 * @param {number | string} number
 * @param {string} word
 */
export function counted(number, word) {
  return `${count(number)} ${word}${Number(number) === 1 ? "" : "s"}`;
}

/**
 * A number in proto JSON: doubles are JSON numbers, or "NaN" and "Infinity".
 * @param {unknown} value
 */
export function number(value) {
  if (typeof value !== "number") return String(value ?? "–");
  if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? count(value) : String(value);
  return String(Number(value.toPrecision(6)));
}

// Control characters, characters that change the text direction, and invisible ones, which could disguise a text. Tabs,
// line breaks and variation selectors are allowed.
// biome-ignore lint/suspicious/noMisleadingCharacterClass: the variation selectors are meant one by one
const UNSEEN = /(?![\t\n\ufe00-\ufe0f])[\p{Cc}\p{Default_Ignorable_Code_Point}\u2028\u2029\ufff9-\ufffc]/gu;

/**
 * Text from outside: invisible characters are replaced by their codes. It is cut after `limit` characters.
 * @param {unknown} text
 * @param {number} limit
 */
export function visible(text, limit = 4000) {
  const whole = String(text ?? "");
  const rest = whole.length - limit;
  const shown = (rest > 0 ? whole.slice(0, limit) : whole).replace(UNSEEN, escaped);
  return rest > 0 ? `${shown} … (${counted(rest, "more character")})` : shown;
}

/** @param {string} character */
function escaped(character) {
  const code = (character.codePointAt(0) ?? 0).toString(16);
  return code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`;
}

/**
 * An enum value without its type: `word("SUBSYSTEM_STATE_TIMED_OUT", "SUBSYSTEM_STATE_")` is "TIMED_OUT".
 * @param {string | undefined} value
 * @param {string} prefix
 */
export function word(value, prefix) {
  return value ? value.replace(prefix, "") : "";
}

/**
 * "TIMED_OUT" in words: "timed out".
 * @param {string} name
 */
export function lower(name) {
  return name.toLowerCase().replaceAll("_", " ");
}

/** A phrase as a sentence. */
export function sentence(phrase) {
  return `${phrase.charAt(0).toUpperCase()}${phrase.slice(1)}.`;
}
