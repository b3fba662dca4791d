//! Every course that two commits can take, with lost answers, late statements, failovers, and other processes.

use tokio::{runtime::Runtime, time::timeout};

use super::*;

/// The epoch of the process, and that of the one before it.
const EPOCH: Epoch = Epoch(7);
const EARLIER: Epoch = Epoch(6);
/// The token that the earlier process has left, the one before those of this process, and that of a rival.
const LEFT: Token = Token(1);
const GIVEN: Token = Token(100);
const RIVAL: Token = Token(500);
/// Most answers that are lost: each needs a barrier. Fewer where there are incidents, which multiply the courses.
const LOST: usize = 3;
const LOST_WITH_INCIDENT: usize = 2;
/// Longer than any course takes, by its clock: each repeated statement waits for at most a second.
const PATIENCE: Duration = Duration::from_mins(1);
/// Most statements that are refused.
const REFUSED: usize = 1;
/// Most failovers, likewise.
const FAILOVERS: usize = 2;
const FAILOVERS_WITH_INCIDENT: usize = 1;

/// The decisions of one course: at each point, one of several. The next course differs in the last decision that had
/// another choice left.
#[derive(Default)]
struct Choices {
    /// Each with the number of choices that there were.
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    /// One of this number of choices.
    fn of(&mut self, number: usize) -> usize {
        if self.at == self.taken.len() {
            self.taken.push((0, number));
        }
        let (choice, known) = self.taken[self.at];
        assert_eq!(known, number, "a course has to be the same each time");
        self.at += 1;
        choice
    }

    /// Goes on to the next course, if there is one.
    fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((choice, number)) = self.taken.pop() {
            if choice + 1 < number {
                self.taken.push((choice + 1, number));
                return true;
            }
        }
        false
    }
}

/// A part of the chain, or of the database, that is built wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A barrier writes whatever token the row has.
    UnconditionalBarrier,
    /// In place of a barrier, the row is read.
    MereRead,
    /// A barrier does not know those before it.
    ForgetfulBarrier,
    /// A barrier notes what it finds even if that is an earlier barrier.
    NoteOverwritten,
    /// An answer comes before the standby has what it says.
    EarlyAnswer,
}

/// An event beside lost answers and failovers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Incident {
    None,
    /// Another process takes over.
    Rival,
    /// The same, and a failover can undo it.
    RivalAtRisk,
    /// Another process begins to take over, and ends without a commit: its barrier leaves a token. A failover can undo
    /// that.
    RivalGivesUp,
    /// Another process claims to lead, and has not committed yet.
    Claim,
    /// An older copy replaces the database, which lacks what was acknowledged.
    OlderCopy,
}

impl Incident {
    /// True if a failover can undo it.
    fn can_be_undone(self) -> bool {
        matches!(self, Self::RivalAtRisk | Self::RivalGivesUp)
    }
}

/// The row, with the tokens of the commits that led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    epoch: Epoch,
    /// The epoch of the last claim, which is in another row.
    claimed: Epoch,
    token: Token,
    found: Token,
    commits: Vec<Token>,
}

/// A statement on its way.
#[derive(Clone, Debug)]
enum Statement {
    Commit { after: Token, token: Token },
    Bar(Barrier),
}

/// A database with a standby. Statements whose answers were lost are executed at any time, or never.
struct Simulated<'c> {
    choices: &'c mut Choices,
    fault: Fault,
    incident: Incident,
    /// The row after each statement that was executed, the last one now.
    rows: Vec<Row>,
    /// Number of `rows` that the standby has for sure.
    acknowledged: usize,
    late: Vec<Statement>,
    /// Number of further answers that can be lost, statements that can be refused, and failovers.
    lost: usize,
    refused: usize,
    failovers: usize,
    /// True once the incident has happened.
    happened: bool,
    /// True once acknowledged statements are gone.
    lacks: bool,
}

impl<'c> Simulated<'c> {
    fn new(choices: &'c mut Choices, fault: Fault, incident: Incident) -> Self {
        let (lost, failovers) = match incident {
            Incident::None => (LOST, FAILOVERS),
            _ => (LOST_WITH_INCIDENT, FAILOVERS_WITH_INCIDENT),
        };
        let row = Row { epoch: EARLIER, claimed: EPOCH, token: LEFT, found: LEFT, commits: Vec::new() };
        Self {
            choices,
            fault,
            incident,
            rows: vec![row],
            acknowledged: 1,
            late: Vec::new(),
            lost,
            refused: REFUSED,
            failovers,
            happened: false,
            lacks: false,
        }
    }

    fn row(&self) -> Row {
        self.rows.last().unwrap().clone()
    }

    /// Executes a statement. Returns what it returns.
    fn execute(&mut self, statement: &Statement) -> Option<Token> {
        let mut row = self.row();
        let found = match statement {
            Statement::Commit { after, token } => {
                if row.token != *after {
                    return None;
                }
                row.commits.push(*token);
                (row.epoch, row.token) = (EPOCH, *token);
                *token
            }
            Statement::Bar(barrier) => {
                let is_barred = barrier.earlier.contains(&row.token) && self.fault != Fault::ForgetfulBarrier;
                let is_known = is_barred || barrier.notes(row.token);
                if self.fault == Fault::MereRead {
                    return Some(row.token);
                }
                if !is_known && self.fault != Fault::UnconditionalBarrier {
                    return None;
                }
                if !is_barred || self.fault == Fault::NoteOverwritten {
                    row.found = row.token;
                }
                row.token = barrier.token;
                row.found
            }
        };
        self.rows.push(row);
        Some(found)
    }

    /// Lets other things happen: late statements arrive, failovers, and the incident.
    fn happens(&mut self) {
        loop {
            let late = self.late.len();
            let unsure = if self.failovers > 0 { self.rows.len() - self.acknowledged } else { 0 };
            let incidents = usize::from(self.incident != Incident::None && !self.happened);
            match self.choices.of(1 + late + unsure + incidents) {
                0 => return,
                choice if choice <= late => {
                    let statement = self.late.remove(choice - 1);
                    self.execute(&statement);
                }
                choice if choice <= late + unsure => {
                    self.failovers -= 1;
                    self.rows.truncate(self.rows.len() - (choice - late));
                }
                _ => self.incident(),
            }
        }
    }

    fn incident(&mut self) {
        self.happened = true;
        let (row, rival) = (self.row(), Epoch(EPOCH.0 + 1));
        match self.incident {
            Incident::None => {}
            Incident::Rival | Incident::RivalAtRisk => {
                self.rows.push(Row { epoch: rival, claimed: rival, token: RIVAL, ..row });
            }
            Incident::RivalGivesUp => self.rows.push(Row { found: row.token, token: RIVAL, ..row }),
            Incident::Claim => self.rows.push(Row { claimed: rival, token: RIVAL, ..row }),
            Incident::OlderCopy => {
                // It lacks at least the last one of those that were acknowledged, unless there is only the first row.
                let kept = 1 + self.choices.of((self.acknowledged - 1).max(1));
                let commits = |rows: &[Row]| rows.last().unwrap().commits.len();
                self.lacks = commits(&self.rows[..kept]) < commits(&self.rows[..self.acknowledged]);
                self.rows.truncate(kept);
                // They were sent to the database before.
                self.late.clear();
            }
        }
        if !self.incident.can_be_undone() {
            self.acknowledged = self.rows.len();
        }
    }

    fn run(&mut self, statement: Statement) -> Answer<Token> {
        self.happens();
        let unavailable = |problem: &str| StoreError::Unavailable { store: "s".into(), problem: problem.into() };
        if self.lost > 0 && self.choices.of(2) == 1 {
            self.lost -= 1;
            self.late.push(statement);
            self.happens();
            return Answer::Lost(unavailable("the answer was lost"));
        }
        if self.refused > 0 && self.choices.of(2) == 1 {
            self.refused -= 1;
            return Answer::Refused(unavailable("it was refused"));
        }
        let returned = self.execute(&statement);
        if self.fault != Fault::EarlyAnswer {
            self.acknowledged = self.rows.len();
        }
        returned.map_or(Answer::Superseded, Answer::Executed)
    }
}

impl Database for Simulated<'_> {
    async fn commit(&mut self, after: Token, token: Token) -> Answer<()> {
        self.run(Statement::Commit { after, token }).map(drop)
    }

    async fn bar(&mut self, barrier: &Barrier) -> Answer<Token> {
        self.run(Statement::Bar(barrier.clone()))
    }

    async fn read(&mut self) -> Result<Stored, StoreError> {
        if self.incident.can_be_undone() {
            self.happens();
        }
        let Row { epoch, claimed, commits, token, .. } = self.row();
        Ok(Stored { epoch, commits: commits.len() as u64, claimed, token })
    }
}

fn chain() -> Chain {
    Chain::new("s".into(), EPOCH, Stored { epoch: EARLIER, commits: 0, claimed: EPOCH, token: LEFT }, GIVEN)
}

/// One course: two commits, each with what the process learns of it, and then whatever is still on its way.
async fn course(database: &mut Simulated<'_>) -> Result<(), String> {
    let (mut chain, mut kept, mut ended, mut was_executed) = (chain(), Vec::new(), None, false);
    for _ in 0..2 {
        let token = chain.given.next();
        let Ok(outcome) = timeout(PATIENCE, chain.commit(database)).await else {
            return Err("the outcome is never found out".into());
        };
        match outcome {
            Ok(()) if database.lacks => return Err("went on although acknowledged commits are gone".into()),
            Ok(()) => kept.push(token),
            Err(error) if error.is_final() => {
                ended = Some(error);
                was_executed = database.row().commits.contains(&token);
                break;
            }
            Err(_) => {}
        }
        database.happens();
    }
    while !database.late.is_empty() {
        let statement = database.late.remove(0);
        database.execute(&statement);
    }
    let Row { claimed, token, commits, .. } = database.row();
    let has_rival = matches!(database.incident, Incident::Rival | Incident::RivalAtRisk | Incident::Claim);
    let is_gone = database.incident == Incident::RivalAtRisk && claimed == EPOCH;
    match ended {
        Some(error) if !database.happened => Err(format!("ended, although nothing was in the way: {error}")),
        // It looks as if the other process had chosen the same epoch, and made the first commit.
        Some(StoreError::Fenced { by: EPOCH })
            if database.incident == Incident::RivalGivesUp && kept.is_empty() && was_executed =>
        {
            return Ok(());
        }
        Some(StoreError::Fenced { by }) if has_rival && by != claimed && !is_gone => {
            Err(format!("fenced by epoch {by}, and not by {claimed}"))
        }
        Some(StoreError::Fenced { .. }) if has_rival => Ok(()),
        Some(error) if database.incident != Incident::OlderCopy => Err(error.to_string()),
        _ if database.lacks => Ok(()),
        _ if commits != kept => Err(format!("{commits:?} are in the database, and {kept:?} were acknowledged")),
        _ => Ok(()),
    }?;
    let is_taken_over = database.happened && has_rival && !is_gone;
    if is_taken_over && token != RIVAL { Err(format!("wrote {token:?} after the rival")) } else { Ok(()) }
}

/// Goes through all courses. Returns their number, and the first problem.
fn all_courses(fault: Fault, incident: Incident) -> (usize, Option<String>) {
    let runtime: Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let (mut choices, mut courses) = (Choices::default(), 0);
    loop {
        courses += 1;
        let checked = runtime.block_on(course(&mut Simulated::new(&mut choices, fault, incident)));
        if let Err(problem) = checked {
            return (courses, Some(format!("{problem}, after {:?}", choices.taken)));
        }
        if !choices.advance() {
            return (courses, None);
        }
    }
}

#[test]
fn each_commit_has_the_outcome_that_was_told_whatever_is_lost_late_or_failed_over() {
    let (courses, problem) = all_courses(Fault::None, Incident::None);
    assert_eq!(problem, None, "in course {courses}");
    assert!(courses > 50_000, "only {courses} courses");
}

#[test]
fn a_process_that_another_one_has_fenced_writes_nothing_more() {
    for incident in [Incident::Rival, Incident::Claim] {
        let (courses, problem) = all_courses(Fault::None, incident);
        assert_eq!(problem, None, "in course {courses}, {incident:?}");
    }
}

#[test]
fn a_process_goes_on_if_a_failover_has_undone_what_fenced_it_before_it_knew() {
    let (courses, problem) = all_courses(Fault::None, Incident::RivalAtRisk);
    assert_eq!(problem, None, "in course {courses}");
}

#[test]
fn a_process_goes_on_after_another_one_that_has_kept_nothing() {
    let (courses, problem) = all_courses(Fault::None, Incident::RivalGivesUp);
    assert_eq!(problem, None, "in course {courses}");
}

#[test]
fn an_older_copy_ends_the_process_as_soon_as_it_writes() {
    let (courses, problem) = all_courses(Fault::None, Incident::OlderCopy);
    assert_eq!(problem, None, "in course {courses}");
}

#[test]
fn each_way_to_build_it_wrong_is_found() {
    for fault in [
        Fault::UnconditionalBarrier,
        Fault::MereRead,
        Fault::ForgetfulBarrier,
        Fault::NoteOverwritten,
        Fault::EarlyAnswer,
    ] {
        let (courses, problem) = all_courses(fault, Incident::None);
        assert!(problem.is_some(), "{fault:?} is not found in {courses} courses");
    }
}
