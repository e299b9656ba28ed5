// A run from Generate to its end, the gallery, and settings that come back from a clip.
function start() {
  if ($('.primary').disabled) return;
  const name = crypto.randomUUID?.() ?? String(Math.random());
  const sides = field('compare').checked ? ['', 'b_'] : [''];
  run = { name, began: Date.now(), sides: sides.length, seen: 0, view: null };
  window.fastvideoForm = { run: name, count: field('count').value || 1, sides: sides.map(settings) };
  complain('');
  trigger('submit');
  tell();
  draw();
  if (matchMedia('(max-width: 860px)').matches) $('.result').scrollIntoView({ behavior: 'smooth', block: 'start' });
}

async function stop() {
  const stopped = run;
  if (!stopped) return;
  stopped.stopping = true;
  tell();
  draw();
  while (run === stopped && !(await server.stop(stopped.name))) await new Promise(done => setTimeout(done, 100));
}

// Views are complete, and some may be missed.
window.fastvideo = view => {
  if (!run || view.run !== run.name) return;
  if (view.stage !== run.view?.stage) run.stageBegan = Date.now();
  Object.assign(run, { view, heard: Date.now() });
  const fresh = run.stopping ? [] : view.clips.slice(run.seen);
  run.seen += fresh.length;
  for (const clip of fresh) keep(clip);
  if (['over', 'stopped', 'failed'].includes(view.phase)) {
    const made = run.stopping ? [] : view.clips;
    run = null;
    if (view.phase === 'failed') complain(view.error, view.field);
    display(made.length ? (view.side === 1 ? made.slice(-2) : made.slice(-1)) : shown);
    tell();
  }
  draw();
};

function draw() {
  const screen = $('.screen'), panel = $('.progress'), view = run?.view;
  panel.hidden = !run;
  element.firstElementChild.dataset.busy = Boolean(run);
  if (!run) return;
  const asked = modelOf('')?.defaults, ratio = asked ? asked.width / asked.height : 1;
  if (view?.preview && !run.stopping) {
    const size = window.fastvideoForm.sides[view.side];
    screen.dataset.state = 'making';
    if (run.drawn !== view.preview) screen.replaceChildren(preview(view.preview, size.width ? size.width / size.height : ratio));
    run.drawn = view.preview;
  } else if (!shown.length || view?.stage) {
    screen.dataset.state = 'waiting';
    if (!run.drawn) screen.replaceChildren(h('div', { class: 'shimmer', style: `aspect-ratio: ${ratio}` }));
  }
  const at = stageOf(view?.stage ?? ''), names = Object.keys(STAGES), past = names.indexOf(at);
  const widths = known[window.fastvideoForm.sides[view?.side ?? 0].model] ?? { encode_text: 1, denoise: 6, decode: 5, save: 2 };
  let done = 0, sum = 0;
  $('.stages').replaceChildren(...names.map((name, i) => {
    const share = i < past ? 1 : i === past && view.stage === name ? view.index / view.steps : 0;
    const width = Math.max(0.04 * Object.values(widths).reduce((a, b) => a + b, 0), widths[name] ?? 0);
    done += share * width; sum += width;
    return h('div', { class: i === past ? 'now' : '', style: `flex: ${width} 1 0` }, h('i', { style: `width: ${100 * share}%` }), h('span', {}, STAGES[name]));
  }));
  $('.stages').setAttribute('aria-valuenow', Math.round((100 * done) / sum));
  tick();
}

function tick() {  // the words of the progress panel, which count seconds by themselves
  if (!run) return;
  const { view } = run, words = [];
  if (run.stopping) words.push('Stopping at the next step');
  else if (!view || (view.phase === 'waiting' && view.ahead == null)) words.push('Sending');
  else if (view.phase === 'waiting') words.push(view.ahead ? `In the queue, ${view.ahead} ${view.ahead > 1 ? 'clips' : 'clip'} before yours` : 'Next in the queue');
  else if (!view.stage) words.push('Loading the model');
  else words.push(STAGES[stageOf(view.stage)] + (view.steps > 1 && view.stage !== 'save' ? ` ${view.index} of ${view.steps}${view.stage === 'decode' ? ' frames' : ''}` : ''));
  if (view?.total > 1) words.unshift(run.sides > 1 ? `Side ${'AB'[view.side]}` + (view.total > 2 ? `, clip ${view.number + 1} of ${view.total}` : '') : `Clip ${view.number + 1} of ${view.total}`);
  words.push(seconds((Date.now() - run.began) / 1000));
  const left = view?.left_s == null ? null : view.left_s - (Date.now() - run.heard) / 1000;
  if (left > 0.3 && !run.stopping) words.push(`about ${seconds(left)} left`);
  const text = words.join(' · ');
  if ($('.progress p').textContent !== text) $('.progress p').textContent = text;
}

function complain(text, name = '') {
  for (const old of form.querySelectorAll('[aria-invalid]')) old.removeAttribute('aria-invalid');
  const at = { class: 'slo_class', fps: 'num_frames' }[name] ?? name;
  const input = { width: field('size').value === 'custom' ? field('width') : field('size') }[at] ?? (at && field(at));
  if (input?.setAttribute) {
    input.setAttribute('aria-invalid', 'true');
    const closed = input.closest('details:not([open])');
    if (closed) closed.open = true;
  }
  $('.alert').hidden = !text;
  $('.alert').replaceChildren(text, h('button', { type: 'button', class: 'quiet', 'aria-label': 'Dismiss', onclick: () => complain('') }, '✕'));
}

function display(some) {
  shown = some;
  if (some.length) show(some, clip => [['Use these settings', () => restore(clip.recipe)]]);
  else empty();
  list();
}

function keep(clip) {
  known[clip.model] = clip.seconds;
  clips = [clip, ...clips].slice(0, offers.max_kept);
  display([clip]);
  list();
}

function list() {
  $('.gallery').hidden = !clips.length;
  const items = $('.gallery ul'), old = new Map([...items.children].map(item => [item.dataset.id, item]));
  items.replaceChildren(...clips.map(clip => {
    const item = old.get(clip.id) ?? entry(clip);
    item.toggleAttribute('data-shown', shown.includes(clip));
    return item;
  }));
}

function entry(clip) {
  const video = playable(clip, { muted: true, preload: 'auto', tabindex: -1, 'aria-hidden': true });
  const { prompt, seed } = clip.recipe.request;
  return h('li', { 'data-id': clip.id, onmouseenter: () => video.play().catch(() => {}), onmouseleave: () => video.pause() },
    h('button', { type: 'button', class: 'thumb', 'aria-label': 'Show: ' + prompt, onclick: () => { if (!run) display([clip]); } }, video),
    h('p', {}, prompt), h('p', { class: 'words' }, h('span', {}, clip.model), h('span', {}, seconds(total(clip))), h('span', {}, `seed ${seed}`)),
    h('p', { class: 'actions' },
      h('button', { type: 'button', class: 'quiet', onclick: () => restore(clip.recipe) }, 'Use these settings'),
      h('button', { type: 'button', class: 'quiet', onclick: () => { if (!run && shown[0] && shown[0] !== clip) display([shown[0], clip]); } }, 'Compare')));
}

function empty() {
  $('.screen').dataset.state = 'empty';
  $('.facts').replaceChildren();
  $('.screen').replaceChildren(h('div', { class: 'nothing' }, h('div', { class: 'shapes', 'aria-hidden': true }, h('i'), h('i'), h('i')),
    h('p', {}, h('b', {}, 'Your clip plays here')), h('p', {}, 'Say what it shows, or take an example, and press Enter.')));
}

// Settings of a recipe, into the form; what the server does not have is said.
function restore(recipe) {
  const { request, model, decoder } = recipe, missing = [];
  const choose = (name, value, what) => {
    field(name).value = value;
    if (field(name).value !== value) { missing.push(`${what} ${value}`); field(name).selectedIndex = 0; }
  };
  field('compare').checked = false;
  choose('model', model.name_or_path, 'model');
  fit('');
  for (const name of ['prompt', 'negative_prompt', 'num_frames', 'guidance_scale', 'seed', 'width', 'height']) field(name).value = request[name];
  if (!field('num_inference_steps').disabled) field('num_inference_steps').value = request.num_inference_steps;
  const size = `${request.width}x${request.height}`;
  field('size').value = [...field('size').options].some(one => one.value === size) ? size : 'custom';
  choose('decoder', decoder?.name_or_path ?? '', 'decoder');
  const [lora] = request.lora ?? [];
  choose('lora', lora?.path ?? '', 'LoRA');
  if (lora) field('strength').value = lora.strength;
  field('slo_class').selectedIndex = 0;
  field('count').value = 1;
  tell();
  complain(missing.length ? `This server does not have ${missing.join(', ')}; the rest of the recipe is set` : '');
  field('prompt').scrollIntoView({ behavior: 'smooth', block: 'center' });
  field('prompt').focus({ preventScroll: true });
}

// The recipe is text in the head of the file, which never leaves the browser.
async function read(file) {
  const text = new TextDecoder('latin1').decode(await file.slice(0, 1 << 22).arrayBuffer());
  const begin = text.search(/\{"version": \d+, "model": \{/);
  for (let end = begin; begin >= 0 && (end = text.indexOf('}', end + 1)) > 0;) {
    try { return restore(JSON.parse(text.slice(begin, end + 1))); } catch (error) { if (!(error instanceof SyntaxError)) throw error; }
  }
  complain(`${file.name} holds no recipe: it is no clip of fastvideo, or was encoded anew`);
}

async function look() {  // what the server offers; asked again until it is ready
  const before = offers, found = await server.offers(null).catch(() => ({ error: 'the page’s own server does not answer; start it again' }));
  if (found.data) offers = found;
  else if (offers) offers = { ...offers, ready: false };
  $('.health').textContent = found.error ?? (found.ready ? 'ready' : 'the model is warming up');
  $('.health').dataset.state = found.error ? 'bad' : found.ready ? 'good' : 'wait';
  if (found.data && !before) {
    for (const side of ['', 'b_']) options(field(side + 'model'), offers.data.map(({ id }) => [id, id]));
    if (offers.data.length > 1) field('b_model').selectedIndex = 1;
    options(field('lora'), [['', 'None'], ...offers.lora.map(name => [name, name])]);
    options(field('slo_class'), offers.slo_class.map(one => [one.name, one.deadline_s && one.name === `${one.deadline_s} s` ? `${one.deadline_s} seconds` : one.name === 'any time' ? 'As long as it takes' : one.name]));
    field('count').max = offers.max_clips;
    $('.lora').hidden = !offers.lora.length;
    $('.budget').hidden = offers.slo_class.length < 2;
    fit('');
    fit('b_');
    if (!field('prompt').value) field('prompt').value = $('.chip').textContent;
  }
  tell();
  setTimeout(look, found.ready ? 10000 : 700);
}

form.addEventListener('submit', event => { event.preventDefault(); start(); });
form.addEventListener('input', tell);
form.addEventListener('change', event => { if (event.target.name === 'model') fit(''); if (event.target.name === 'b_model') fit('b_'); });
field('prompt').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  start();
});
$('.stop').addEventListener('click', stop);
$('.open input').addEventListener('change', event => { if (event.target.files[0]) read(event.target.files[0]); event.target.value = ''; });
$('.theme').addEventListener('click', () => { const dark = body.classList.toggle('dark'); try { localStorage.fastvideoTheme = dark ? 'dark' : 'light'; } catch { /* a private window */ } });
try { if (localStorage.fastvideoTheme) body.classList.toggle('dark', localStorage.fastvideoTheme === 'dark'); } catch { /* a private window */ }
const files = event => [...(event.dataTransfer?.types ?? [])].includes('Files');
addEventListener('dragover', event => { if (files(event)) { event.preventDefault(); $('.drop').hidden = false; } });
addEventListener('dragleave', event => { if (!event.relatedTarget) $('.drop').hidden = true; });
addEventListener('drop', event => { if (!files(event)) return; event.preventDefault(); $('.drop').hidden = true; read(event.dataTransfer.files[0]); });
setInterval(tick, 100);
empty();
look();
