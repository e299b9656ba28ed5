// A run from Generate to its end, and what is heard of the server and the browser.
const USUAL = { encode_text: 1, denoise: 6, decode: 5, save: 1 };
const dark = document.body.classList;
let run = null;

function start() {
  if ($('.primary').disabled) return;
  const sides = (field('compare').checked ? ['', 'b_'] : ['']).map(settings);
  run = { name: `${Date.now()}-${Math.random()}`, began: Date.now(), sides, seen: 0, view: null };
  window.fastvideoForm = { run: run.name, count: field('count').value || 1, sides };
  complain('');
  trigger('submit');
  tell();
  draw();
  if (matchMedia('(max-width: 860px)').matches) $('.result').scrollIntoView({ behavior: 'smooth' });
}

async function stop() {
  const stopped = run;
  run.isStopping = true;
  draw();
  while (run === stopped && !(await server.stop(stopped.name))) await new Promise(done => setTimeout(done, 100));
}

// A view is complete, and some may be missed.
window.fastvideo = view => {
  if (!run || view.run !== run.name) return;
  Object.assign(run, { view, heard: Date.now() });
  const made = run.isStopping ? [] : view.clips.map(clip => ({ ...clip, recipe: recipeOf(clip.recipe) }));
  for (const clip of made.slice(run.seen)) keep(clip);
  run.seen = made.length;
  if (['over', 'stopped', 'failed'].includes(view.phase)) {
    const isBoth = run.sides.length > 1 && view.side === 1 && view.phase === 'over';
    run = null;
    if (view.phase === 'failed') complain(view.error, view.field);
    display(isBoth ? made.slice(-2) : shown);
    tell();
  }
  draw();
};

function draw() {
  const view = run?.view, screen = $('.screen');
  $('.progress').hidden = !run;
  $('.facts').hidden = Boolean(run?.drawn);
  if (!run) return;
  $('.stop').disabled = Boolean(run.isStopping);
  const size = { ...modelOf('')?.defaults, ...run.sides[view?.side ?? 0] }, ratio = size.width / size.height || 1;
  if (view?.preview && run.drawn !== view.preview && !run.isStopping) {
    screen.dataset.state = 'making';
    screen.replaceChildren(preview(view.preview, ratio));
    run.drawn = view.preview;
  } else if (!run.drawn && (!shown.length || view?.stage)) {
    screen.dataset.state = 'waiting';
    screen.replaceChildren(h('div', { class: 'shimmer', style: `aspect-ratio: ${ratio}` }));
  }
  const names = Object.keys(STAGES), now = names.indexOf(stageOf(view?.stage)), widths = took[size.model] ?? USUAL;
  const whole = sum(Object.values(widths)), rows = names.map((name, i) => {
    const share = i < now ? 1 : name === view?.stage ? view.index / view.steps : 0;
    return { name, share, width: Math.max(0.08 * whole, widths[name] ?? 0), isNow: i === now };
  });
  $('.stages').replaceChildren(...rows.map(({ name, share, width, isNow }) =>
    h('div', { class: isNow && 'now', style: `flex-grow: ${width}` }, h('i', { style: `width: ${100 * share}%` }), h('span', {}, STAGES[name]))));
  const done = sum(rows.map(row => row.share * row.width)) / sum(rows.map(row => row.width));
  $('.stages').setAttribute('aria-valuenow', Math.round(100 * done));
  tick();
}

function doing(view) {
  if (run.isStopping) return 'Stopping at the next step';
  if (!view || (view.phase === 'waiting' && view.ahead == null)) return 'Sending';
  if (view.phase === 'waiting') return view.ahead ? `In the queue: ${view.ahead} before yours` : 'Next in the queue';
  if (!view.stage) return 'Loading the model';
  const unit = view.stage === 'decode' ? ' frames' : '';
  return STAGES[stageOf(view.stage)] + (view.steps > 1 ? ` ${view.index} of ${view.steps}${unit}` : '');
}

function tick() {  // the words of the progress panel, which count seconds by themselves
  if (!run) return;
  const { view } = run, words = [doing(view)];
  if (view?.total > 1) words.unshift(`Clip ${view.number + 1} of ${view.total}`);
  if ($('.said').textContent !== words.join(', ')) $('.said').textContent = words.join(', ');
  words.push(seconds((Date.now() - run.began) / 1000));
  const left = (view?.left_s ?? 0) - (Date.now() - run.heard) / 1000;
  if (left > 0.3 && view.phase === 'making' && !run.isStopping) words.push(`about ${seconds(left)} left`);
  $('.progress p').textContent = words.join(' · ');
}

function complain(text, name = '') {
  for (const old of form.querySelectorAll('[aria-invalid]')) old.removeAttribute('aria-invalid');
  const input = field({ class: 'slo_class', width: 'size', height: 'size', fps: 'num_frames' }[name] ?? name);
  input?.setAttribute('aria-invalid', 'true');
  if (input?.closest('details')) input.closest('details').open = true;
  $('.alert').hidden = !text;
  if (text) $('.alert').scrollIntoView({ block: 'nearest' });
  $('.alert').replaceChildren(text, button('✕', () => complain(''), { 'aria-label': 'Dismiss' }));
}

async function look() {  // what the server offers, asked again and again
  const isFirst = !offers, found = await server.offers(null).catch(() => ({ error: 'The page’s server has ended; start it again' }));
  if (found.data) offers = found;
  $('.health').textContent = found.error ?? (found.ready ? 'ready' : 'The model is loading');
  $('.health').dataset.state = found.error ? 'bad' : found.ready ? 'good' : 'wait';
  if (found.data && isFirst) {
    for (const name of ['model', 'b_model']) options(name, offers.data.map(({ id }) => [id, id]));
    field('b_model').selectedIndex = Math.min(1, offers.data.length - 1);
    options('lora', [['', 'None'], ...offers.lora.map(name => [name, name])]);
    field('count').max = offers.max_clips;
    fit('');
    fit('b_');
    if (!field('prompt').value) field('prompt').value = $('.chip').textContent;
  }
  tell();
  setTimeout(look, found.ready ? 10000 : 700);
}

form.addEventListener('submit', event => { event.preventDefault(); start(); });
form.addEventListener('input', tell);
field('model').addEventListener('change', () => fit(''));
field('b_model').addEventListener('change', () => fit('b_'));
field('prompt').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  start();
});
$('.stop').addEventListener('click', stop);
$('.open input').addEventListener('change', ({ target }) => { read(target.files[0]); target.value = ''; });
$('.theme').addEventListener('click', () => dark.toggle('dark'));
const hover = (is, event) => {
  if (![...(event.dataTransfer?.types ?? [])].includes('Files')) return false;
  event.preventDefault();
  $('.drop').hidden = !is;
  return true;
};
addEventListener('dragover', event => hover(true, event));
addEventListener('dragleave', event => event.relatedTarget || hover(false, event));
addEventListener('drop', event => hover(false, event) && read(event.dataTransfer.files[0]));
setInterval(tick, 100);
empty();
look();
