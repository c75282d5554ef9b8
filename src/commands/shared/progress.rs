//! Progress on standard error: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::table::{decimals, percent};
use crate::evaluate::Report;
use crate::task::Task;
use crate::train::Observer;

fn shown() -> bool {
    std::io::stderr().is_terminal() && log::log_enabled!(log::Level::Info)
}

/// A spinner with a message, hidden if there is no terminal.
pub fn spinner(verb: &str) -> ProgressBar {
    let target = if shown() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let spinner = ProgressBar::with_draw_target(None, target);
    let style = ProgressStyle::with_template(&format!("{{spinner}} {verb} {{msg}}"));
    spinner.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Shows training: a bar per epoch, and a line when the epoch ends.
pub struct TrainingProgress<'a> {
    tasks: &'a [Task],
    /// Steps of the whole training, and steps done.
    n_steps: usize,
    step: usize,
    n_epochs: usize,
    bar: ProgressBar,
    /// When this process started training, and the steps done before.
    begun: Option<(Instant, usize)>,
    /// Start of the epoch.
    started: Instant,
    n_tokens: i64,
    losses: String,
}

impl<'a> TrainingProgress<'a> {
    /// For a training of `n_steps` steps, of which `step` are done.
    pub fn new(tasks: &'a [Task], n_steps: usize, step: usize) -> Self {
        TrainingProgress {
            tasks,
            n_steps,
            step,
            n_epochs: 0,
            bar: ProgressBar::hidden(),
            begun: None,
            started: Instant::now(),
            n_tokens: 0,
            losses: String::new(),
        }
    }

    fn named(&self, losses: &[Option<f64>]) -> String {
        let pairs = self.tasks.iter().zip(losses);
        pairs
            .filter_map(|(task, loss)| Some(format!("{} {}", task.name, decimals((*loss)?, 3))))
            .collect::<Vec<_>>()
            .join("  ")
    }

    /// The estimated remaining time, from the mean time per step including evaluations; empty before the first step.
    fn left(&self) -> String {
        match self.begun {
            Some((begun, first)) if self.step > first => {
                let each = begun.elapsed() / (self.step - first) as u32;
                format!("  {} left", HumanDuration(each * (self.n_steps.saturating_sub(self.step)) as u32))
            }
            _ => String::new(),
        }
    }

    /// Whether training ended before its last planned step.
    pub fn stopped_early(&self) -> bool {
        self.step < self.n_steps
    }

    fn tokens_per_sec(&self) -> f64 {
        self.n_tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }
}

impl Observer for TrainingProgress<'_> {
    fn epoch_started(&mut self, epoch: usize, n_steps: usize, done: usize) {
        self.n_epochs = self.n_steps.div_ceil(n_steps);
        self.step = (epoch - 1) * n_steps + done;
        self.begun.get_or_insert((Instant::now(), self.step));
        if shown() {
            self.bar = ProgressBar::new(n_steps as u64);
            let template = "epoch {prefix} {bar:25} {pos}/{len}  {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style.progress_chars("━╸ "));
            }
            self.bar.set_prefix(format!("{epoch}/{}", self.n_epochs));
            self.bar.set_position(done as u64);
        }
        self.started = Instant::now();
        self.n_tokens = 0;
    }

    fn step_taken(&mut self, n_tokens: i64, losses: Option<&[Option<f64>]>) {
        self.n_tokens += n_tokens;
        self.step += 1;
        if let Some(losses) = losses {
            self.losses = format!("  loss {}", self.named(losses));
        }
        self.bar.inc(1);
        let speed = self.tokens_per_sec() / 1e3;
        self.bar.set_message(format!("{speed:.1}k tokens/s{}{}", self.losses, self.left()));
    }

    fn epoch_ended(&mut self, epoch: usize, losses: &[Option<f64>], report: &Report, improved: bool) {
        let speed = self.tokens_per_sec() / 1e3;
        self.bar.finish_and_clear();
        let score = |task: &crate::evaluate::TaskReport| {
            // Without the metric's name, which the final table gives: the line has to fit a terminal.
            Some(format!("{} {}", task.name, percent(task.main_score()?.value)))
        };
        let mut scores: Vec<String> =
            report.tasks.iter().filter(|task| task.n_sentences > 0).filter_map(score).collect();
        scores.extend(report.sentence_accuracy.map(|accuracy| format!("sentences {}", percent(accuracy))));
        let best = if improved { "  best" } else { "" };
        log::info!(
            "epoch {epoch:>2}/{}  {speed:5.1}k tokens/s  loss {}{}",
            self.n_epochs,
            self.named(losses),
            if scores.is_empty() { String::new() } else { format!("  dev {}{best}", scores.join("  ")) },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_to_come_take_as_long_as_those_since_the_run_went_on() {
        let mut progress = TrainingProgress::new(&[], 100, 0);
        progress.epoch_started(3, 20, 0);
        assert_eq!((progress.n_epochs, progress.step, progress.left()), (5, 40, String::new()));
        progress.begun = Some((Instant::now() - Duration::from_secs(60), 40));
        progress.step_taken(1, None);
        progress.step = 60;
        assert_eq!(progress.left(), "  2 minutes left");
    }
}
